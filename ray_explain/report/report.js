// Filters for the worked examples; without this script all of them are shown.
(() => {
  "use strict";
  const step = 12;

  const filterExamples = (form) => {
    const cards = [...document.querySelectorAll("#cards > .card")];
    const shown = document.getElementById("shown");
    const more = document.getElementById("more");
    let limit = step;

    const update = () => {
      const wanted = [...new FormData(form)].filter(([, value]) => value !== "");
      const found = cards.filter((card) => wanted.every(([name, value]) => card.dataset[name] === value));
      const visible = new Set(found.slice(0, limit));
      for (const card of cards) card.hidden = !visible.has(card);
      more.hidden = found.length <= limit;
      shown.textContent = found.length === 0 ? "no example of this kind" : `${visible.size} of ${found.length}`;
    };

    form.hidden = false;
    form.addEventListener("submit", (event) => event.preventDefault());
    form.addEventListener("change", () => {
      limit = step;
      update();
    });
    more.addEventListener("click", () => {
      const before = cards.filter((card) => !card.hidden).length;
      limit += step;
      update();
      const next = cards.filter((card) => !card.hidden)[before];
      next.tabIndex = -1;
      next.focus();
    });
    form.reset();
    update();
  };

  const form = document.getElementById("filters");
  if (form) filterExamples(form);

  // a table that is wider than the screen can be scrolled with the keyboard
  for (const part of document.querySelectorAll(".scroll")) {
    if (part.scrollWidth > part.clientWidth) part.tabIndex = 0;
  }

  // paper has no buttons: print what is folded away, then fold it again
  let folded = [];
  window.addEventListener("beforeprint", () => {
    folded = [...document.querySelectorAll("details:not([open])")];
    for (const part of folded) part.open = true;
  });
  window.addEventListener("afterprint", () => {
    for (const part of folded) part.open = false;
  });
})();
