import json

from ray_explain.artifacts import Manifest
from ray_explain.report.provenance import MOST_OF_KIND, kinds


def manifest(kind="explainers", label="a", commit="c0ffee", versions=None, dropped=None, **config):
    return Manifest(
        kind=kind,
        label=label,
        fingerprint=f"f-{label}",
        config=config,
        parents=(),
        rows=10,
        dropped=dropped or {},
        seconds=1.5,
        commit=commit,
        versions=versions or {"torch": "2.13.0"},
    )


def test_what_all_of_a_kind_have_in_common_is_told_once_and_the_rest_with_each():
    made = [manifest(label=f"s{seed}", seed=seed, lora={"rank": 8}, epochs=1) for seed in (0, 1)]
    made += [manifest(label="part", seed=0, lora={"rank": 8}, epochs=1, fraction=0.3, versions={"torch": "2.12.0"})]
    (kind,) = kinds(made)
    assert json.loads(kind.config) == {"lora": {"rank": 8}, "epochs": 1}
    assert kind.versions == {"commit": "c0ffee"}
    assert [it.own for it in kind.made] == [
        "seed 0, torch 2.13.0",
        "seed 1, torch 2.13.0",
        "seed 0, fraction 0.3, torch 2.12.0",
    ]


def test_kinds_stand_in_their_order_with_their_sums():
    made = [manifest("models"), manifest(dropped={"long": 2}), manifest(label="b", dropped={"long": 1, "odd": 1})]
    models, explainers = kinds(made)
    assert (models.name, models.number, models.rows) == ("models", 1, 10)
    assert (explainers.number, explainers.rows, explainers.seconds) == (2, 20, 3.0)
    assert explainers.dropped == {"long": 3, "odd": 1}
    assert models.made[0].own == "" and models.made[0].manifest is made[0]


def test_very_many_of_a_kind_are_cut_and_counted():
    (kind,) = kinds([manifest(label=str(i)) for i in range(MOST_OF_KIND + 5)])
    assert (kind.number, len(kind.made)) == (MOST_OF_KIND + 5, MOST_OF_KIND)
