import time
from dataclasses import replace

import pytest

from ray_explain.endpoints import ENOUGH, GIVEN_UP_AFTER, SILENT, UNREACHABLE, UNUSABLE, Ask, Chat, Endpoint
from ray_explain.errors import BadInput, JobFailed


@pytest.fixture
def place(endpoint, tmp_path):
    return Endpoint(
        model="m", cache=str(tmp_path), address=endpoint.address, key_variable="TEST_CHAT_KEY", pause=0.01, tries=3
    )


def asks(*prompts):
    return [Ask(prompt, max_tokens=5) for prompt in prompts]


def number(_, reply):
    return int(reply) if reply.isdigit() else None


def test_equal_requests_are_made_once_and_later_runs_take_the_reply_from_disk(endpoint, place, monkeypatch):
    monkeypatch.setenv("TEST_CHAT_KEY", "secret")
    endpoint.script = lambda prompt, n: {"a": "1", "b": "2"}[prompt]
    chat = Chat(replace(place, input_price=2.0, output_price=10.0))
    assert chat.replies(asks("a", "b", "a"), number) == [1, 2, 1]
    path, body, key = endpoint.asked[0]
    assert (path, body["model"], body["max_tokens"], key) == ("/v1/chat/completions", "m", 5, "Bearer secret")
    assert (chat.usage.asked, chat.usage.calls, chat.usage.cached, chat.usage.unanswered) == (2, 2, 0, 0)
    assert (chat.usage.input_tokens, chat.usage.output_tokens) == (200, 20)
    assert chat.usage.cost == pytest.approx((200 * 2 + 20 * 10) / 1e6)
    again = Chat(place)
    assert again.replies(asks("a", "b"), number) == [1, 2]
    assert (again.usage.calls, again.usage.cached, again.usage.cost) == (0, 2, 0)
    assert len(endpoint.asked) == 2


@pytest.mark.parametrize(
    "change",
    [{"prompt": "b"}, {"max_tokens": 6}, {"temperature": 0.5}, {"sample": 1}, {"system": "s"}],
    ids=lambda change: next(iter(change)),
)
def test_another_request_or_model_is_asked_anew(endpoint, place, change):
    endpoint.script = lambda prompt, n: str(n)
    (first,) = asks("a")
    assert Chat(place).replies([first], number) == [1]
    assert Chat(place).replies([first._replace(**change)], number) == [2]
    assert Chat(replace(place, model="other")).replies([first], number) == [3]


@pytest.mark.parametrize(
    ("trouble", "reason"),
    [
        (429, "429"),
        (500, "500"),
        ("I would rather not", UNUSABLE),
        (b"<html>Bad gateway</html>", UNUSABLE),
        (b"[1, 2]", UNUSABLE),
        (b'{"choices": [{"message": {"content": null}}]}', UNUSABLE),
        (b"\xff\xfe", UNUSABLE),
        (0.4, SILENT),
    ],
)
def test_an_endpoint_in_trouble_is_asked_again_and_the_trouble_counted(endpoint, place, trouble, reason):
    endpoint.script = lambda prompt, n: trouble if n < 3 else "7"
    chat = Chat(replace(place, timeout=0.2))
    assert chat.replies(asks("a"), number) == [7]
    assert chat.usage.failures == {reason: 2}
    assert (chat.usage.calls, chat.usage.unanswered) == (3, 0)


def test_what_was_never_answered_is_none_counted_and_not_kept(endpoint, place):
    endpoint.script = lambda prompt, n: 429 if prompt == "b" else "1"
    chat = Chat(place)
    assert chat.replies(asks("a", "b"), number) == [1, None]
    assert chat.usage.failures == {"429": 3}
    assert (chat.usage.asked, chat.usage.unanswered) == (2, 1)
    endpoint.script = lambda prompt, n: "2"
    assert Chat(place).replies(asks("a", "b"), number) == [1, 2]


def test_a_reply_that_comes_drop_by_drop_is_given_up_in_time(endpoint, place):
    started = time.monotonic()
    slow = Chat(replace(place, timeout=0.3, tries=1))
    endpoint.RequestHandlerClass = dripping(endpoint.RequestHandlerClass)
    assert slow.replies(asks("a"), number) == [None]
    assert slow.usage.failures == {SILENT: 1}
    assert time.monotonic() - started < 2


def dripping(handler):
    class Dripping(handler):
        def do_POST(self):
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(200)
            self.end_headers()
            for _ in range(30):
                try:
                    self.wfile.write(b" ")
                    self.wfile.flush()
                except OSError:
                    return
                time.sleep(0.1)

    return Dripping


def test_an_endpoint_out_of_reach_is_counted(tmp_path):
    chat = Chat(Endpoint(model="m", cache=str(tmp_path), address="http://127.0.0.1:9/v1", tries=2, pause=0.01))
    assert chat.replies(asks("a"), number) == [None]
    assert chat.usage.failures == {UNREACHABLE: 2}


@pytest.mark.parametrize("trouble", [503, 429, b"<html>Bad gateway</html>"])
def test_an_endpoint_that_leaves_many_requests_in_a_row_without_a_reply_is_given_up(endpoint, place, trouble):
    endpoint.script = lambda prompt, n: trouble
    chat = Chat(replace(place, threads=4))
    with pytest.raises(
        JobFailed, match=rf"'m' at {endpoint.address} answered none of {GIVEN_UP_AFTER} requests in a row"
    ):
        chat.replies(asks(*map(str, range(500))), number)
    assert (
        chat.usage.calls <= (GIVEN_UP_AFTER + 4) * place.tries
    )  # those under way end with it, the others are not begun


def test_an_endpoint_that_nobody_can_reach_is_given_up(tmp_path):
    nobody = Endpoint(model="m", cache=str(tmp_path), address="http://127.0.0.1:9/v1", tries=2, pause=0.01)
    with pytest.raises(JobFailed, match=rf"\(\d+ x {UNREACHABLE}\); start again when it answers"):
        Chat(nobody).replies(asks(*map(str, range(500))), number)


def test_what_was_answered_before_an_endpoint_fell_silent_is_not_asked_for_again(endpoint, place):
    endpoint.script = lambda prompt, n: "7" if int(prompt) < 5 else 503
    requests = asks(*map(str, range(5 + GIVEN_UP_AFTER)))
    with pytest.raises(JobFailed, match="in a row"):
        Chat(replace(place, threads=1)).replies(requests, number)
    endpoint.script = lambda prompt, n: "7"
    again = Chat(place)
    assert again.replies(requests, number) == [7] * len(requests)
    assert (again.usage.cached, again.usage.calls) == (5, GIVEN_UP_AFTER)


@pytest.mark.parametrize("now_and_then", ["7", 400, "no number"])
def test_an_endpoint_that_says_something_now_and_then_is_not_given_up(endpoint, place, now_and_then):
    """Even where it does not say what was asked for: one reply among them is of use."""
    endpoint.script = lambda prompt, n: "1" if prompt == "0" else 503 if int(prompt) % GIVEN_UP_AFTER else now_and_then
    chat = Chat(replace(place, threads=1, tries=2))
    found = chat.replies(asks(*map(str, range(3 * GIVEN_UP_AFTER))), number)
    assert chat.usage.unanswered == sum(made is None for made in found) >= 3 * (GIVEN_UP_AFTER - 1)


@pytest.mark.parametrize("useless", [400, "I would rather not"])
def test_an_endpoint_that_gives_nothing_of_use_is_told_when_there_were_enough_requests(endpoint, place, useless):
    endpoint.script = lambda prompt, n: useless
    with pytest.raises(JobFailed, match=f"answered none of {ENOUGH} requests \\("):
        Chat(place).replies(asks(*map(str, range(ENOUGH))), number)
    assert Chat(place).replies(asks(*map(str, range(ENOUGH - 1))), number) == [None] * (ENOUGH - 1)


def test_a_request_that_is_refused_for_what_it_says_is_not_repeated(endpoint, place):
    endpoint.script = lambda prompt, n: 400 if prompt == "too long" else "1"
    chat = Chat(place)
    assert chat.replies(asks("too long", "a"), number) == [None, 1]
    assert chat.usage.failures == {"400": 1}


@pytest.mark.parametrize("status", [401, 402, 403, 404])
def test_a_wrong_key_model_or_address_or_an_empty_account_stops_the_work(endpoint, place, status):
    endpoint.script = lambda prompt, n: status
    with pytest.raises(BadInput, match=rf"'m' at {endpoint.address} refuses with {status} .* \$TEST_CHAT_KEY"):
        Chat(place).replies(asks("a"), number)


def test_requests_are_made_side_by_side_but_no_more_than_threads(endpoint, place):
    endpoint.script = lambda prompt, n: "1"
    endpoint.RequestHandlerClass = delayed(endpoint.RequestHandlerClass)
    started = time.monotonic()
    assert Chat(replace(place, threads=4)).replies(asks(*"abcdefgh"), number) == [1] * 8
    assert 1 < endpoint.most_at_once <= 4
    assert time.monotonic() - started < 8 * 0.2


def delayed(handler):
    class Delayed(handler):
        def send_response(self, *args):
            time.sleep(0.2)
            super().send_response(*args)

    return Delayed
