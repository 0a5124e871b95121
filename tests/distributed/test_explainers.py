"""What a training is given."""

from pathlib import Path

import pyarrow as pa

from ray_explain import storage
from ray_explain.config import read_experiment
from ray_explain.distributed.explainers import train_run
from ray_explain.distributed.plan import Plan
from ray_explain.distributed.session import Session
from tests.tiny import config_in


def test_a_run_counts_its_training_questions_without_reading_their_vectors(tmp_path: Path) -> None:
    own = Plan(read_experiment(config_in(tmp_path, train={"mixtures": [["patching", "ablation"]], "replay": 0.5})))
    (run,) = [run for run in own.runs() if (run.explainer, run.target) == ("qwen3", "llama")]
    for task, splits in (("patching", ["train", "train", "test"]), ("ablation", ["train", "train", "validation"])):
        keys = pa.table({"split": splits, "group": ["a", "b", "c"]})  # reading any other column would fail
        storage.write_table(keys, f"{own.path(own.questions(task, 'llama'))}/part.parquet")
    with Session(own) as session:
        assert len(train_run(session, run).replay) == 2
