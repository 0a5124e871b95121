"""What an evaluation refuses before it starts."""

from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pytest

from ray_explain import storage
from ray_explain.distributed import evaluation
from ray_explain.distributed.session import Session
from ray_explain.errors import BadInput
from tests.distributed.test_sources import plan


def test_a_control_that_the_questions_do_not_allow_is_told_before_any_training(
    questions: tuple[str, str], world_target: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    every = storage.read_table(questions[0])
    one = every.filter(pc.equal(every["split"], "validation")).slice(0, 1)
    at = one.schema.get_field_index("split")
    asked = one.set_column(at, one.schema.field(at), pa.array(["test"]))
    alone = plan(world_target, tmp_path, {"source": "world"}, task="patching")
    monkeypatch.setattr(evaluation, "make_ground_truth", lambda session: None)
    monkeypatch.setattr(Session, "start_ray", lambda session: pytest.fail("training was to start"))
    with Session(alone) as session:
        session.make_table(alone.questions("patching", "m"), lambda: asked)
        with pytest.raises(BadInput, match="control 'shuffled': no two questions with 1 vectors"):
            evaluation.evaluate(session)
