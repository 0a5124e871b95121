"""What each worker of an explainer's training does: Ray Train has made the process group, DeepSpeed does the steps."""

import logging
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import ray.train
import ray.train.torch
import torch
import torch.distributed as dist
from jaxtyping import Float
from pyarrow.fs import FileSelector, FileType
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ray_explain import storage
from ray_explain.artifacts import finish, finished
from ray_explain.distributed.checkpoints import load_shares, save_share, state_of
from ray_explain.distributed.checks import way_out
from ray_explain.distributed.halting import Halted, Hearing
from ray_explain.distributed.question_stream import own_cores, read_through_ray
from ray_explain.distributed.train import STOPPED, TrainRun, best_folder
from ray_explain.distributed.training_setup import Start, new_engine, start_of, told_of_dropped
from ray_explain.distributed.validation import Sample, held_out, sample_of, validate
from ray_explain.distributed.watching import CURVE, Watch
from ray_explain.distributed.zero import take_step, whole_state
from ray_explain.errors import BadInput, JobFailed
from ray_explain.explainer.batches import Step, answer_tokens, collate, micro_batch
from ray_explain.explainer.examples import Example
from ray_explain.explainer.module import Explainer
from ray_explain.explainer.optimise import learning_rate_factor
from ray_explain.explainer.sidecar import save_explainer, sidecar_of
from ray_explain.explainer.training import NotFinite, not_finite
from ray_explain.questions import wordings

logger = logging.getLogger(__name__)
_SECONDS_BETWEEN_LOOKS, _SECONDS_UNTIL_SAID = 0.1, 10.0
_KEPT = "kept.json"  # in the best explainers' folder: which of the two, and how good it is


class Taken(NamedTuple):
    """One step that this worker took its share of."""

    number: int  # from 1
    sums: Float[Tensor, "3"]  # of the share: NLL, right answer tokens, answer tokens
    gradient_norm: float  # of the whole step, before clipping
    learning_rate: float


def train_on_worker(run: TrainRun, root: str, board: Any, verdicts: Any, max_dropped: float) -> None:
    """What every worker does: the same steps in the same order, each with its share of every step's examples.

    What no new start could mend, and what all workers therefore meet alike, ends the run instead of failing it, since
    Ray Train would start failed workers again; the driver finds the reason in the run's folder. A full object store,
    which may have room again, is said at once and fails the run: it is started again, but nobody waits in the dark.
    """
    try:
        _train(run, root, board, verdicts, max_dropped)
    except Halted as told:
        logger.info("%s", told)
    except (BadInput, NotFinite) as error:
        if dist.get_rank() == 0:
            storage.write_json({"reason": str(error)}, f"{root}/ray_train/{run.name}/{STOPPED}")
    except Exception as error:
        sentence = way_out(error)
        if sentence is not None:
            board.say.remote(f"{run.artifact.label}: {sentence}")
        raise


def _train(run: TrainRun, root: str, board: Any, verdicts: Any, max_dropped: float) -> None:
    started, workers = time.monotonic(), dist.get_world_size()
    _use_device(offload=run.train.offload)
    scratch = _scratch(run)
    start = start_of(run, workers, read_through_ray)
    told = told_of_dropped(start, run.artifact.label, max_dropped)
    if told is not None and dist.get_rank() == 0:
        board.say.remote(told)
    sample = _sample(run, start)
    with _last_checkpoint() as (folder, state):
        engine = new_engine(start.explainer, run.train, workers)
        if folder is not None:
            load_shares(engine, folder)
    state = state or {"step": 0, "lines": ""}
    watch = Watch(board, run, root, len(start.steps), first=dist.get_rank() == 0, lines=state["lines"])
    best = _Best(run, root, start, watch)
    train, hearing = run.train, Hearing(verdicts, run.name, len(start.steps))

    def after(taken: Taken) -> None:
        number, last = taken.number, taken.number == len(start.steps)
        watch.step(number, taken.sums, taken.gradient_norm, taken.learning_rate)
        measured: dict[str, float] = {}
        if sample is not None and (number % train.validate_every == 0 or last):
            measured = validate(engine.module, sample, start.tokenizer, zero_stage=train.zero_stage)
            watch.validation(number, measured)
            best.offer(engine, measured["validation_exact"], last=last)
        if number % train.checkpoint_every == 0 and not last:
            _report(engine, {"step": number, "lines": watch.lines}, watch.last | measured, scratch, board.say)
            watch.share()
        elif measured:
            ray.train.report(watch.last | measured, checkpoint_upload_mode=ray.train.CheckpointUploadMode.ASYNC)
        hearing.after(number, watch.last)

    train_steps(engine, start.examples, start.steps, run, pad_id=start.pad_id, first=state["step"], after=after)
    how = {"workers": workers, "zero_stage": train.zero_stage, "resumed_at": state["step"]}
    _save(engine, run, root, start, watch, best, how, time.monotonic() - started)
    watch.close()


def _use_device(*, offload: bool) -> None:
    if torch.cuda.is_available():
        torch.cuda.set_device(ray.train.torch.get_device())
        if offload:  # the host does the optimizer's steps; Ray gives a worker one thread
            torch.set_num_threads(own_cores())


def train_steps(
    engine: Any,
    examples: Sequence[Example],
    steps: Sequence[Step],
    run: TrainRun,
    *,
    pad_id: int,
    first: int = 0,
    after: Callable[[Taken], None],
) -> None:
    """All steps from `first` on (from 0); `after` is called after each. Needs a process group, and not Ray.

    Raises:
        NotFinite: on all workers, before the weights are touched; the message names the questions.
    """
    train, rank, world = run.train, dist.get_rank(), dist.get_world_size()
    cuda = engine.device.type == "cuda"
    generator = torch.cuda.default_generators[engine.device.index] if cuda else torch.default_generator
    engine.train()
    for number in range(first, len(steps)):
        rate = train.learning_rate * learning_rate_factor(
            number, len(steps), schedule=train.schedule, warmup=train.warmup
        )
        for group in engine.optimizer.param_groups:
            group["lr"] = rate
        generator.manual_seed(hash((run.seed, number, rank)))  # of dropout, the same after a restart
        step = steps[number]
        # DeepSpeed averages over workers and accumulated passes; the step's loss is a sum over its micro-batches.
        share = answer_tokens([examples[i] for part in step for i in part]) / len(step)
        sums, norm = torch.zeros(3, device=engine.device), 0.0
        own = step[rank::world]
        for place, part in enumerate(own):
            batch = collate(micro_batch(examples, step, part), pad_id).to(engine.device)
            outcome = engine(batch, n_answer_tokens=share)
            engine.backward(outcome.loss)
            _check_finite(outcome.loss, [examples[i].question_id for i in part])  # a GPU is busy behind us meanwhile
            if place < len(own) - 1:
                engine.step()  # counts the pass; weights change after the last one
            else:
                norm = take_step(engine, train.clip, [examples[i].question_id for part in step for i in part])
            sums += torch.stack([outcome.nll, outcome.n_right, outcome.n_tokens]).float()
        after(Taken(number + 1, sums, norm, rate))


def _check_finite(loss: Float[Tensor, ""], question_ids: Sequence[str]) -> None:
    """Raises: NotFinite: on all workers, if the loss of any of them is NaN or infinite."""
    bad = (~torch.isfinite(loss.detach())).int()
    if dist.get_world_size() > 1:
        dist.all_reduce(bad, op=dist.ReduceOp.MAX)
    if bad:
        told: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(told, (loss.item(), list(question_ids)) if not torch.isfinite(loss) else None)
        raise not_finite("the loss", *next(one for one in told if one is not None))


def _sample(run: TrainRun, start: Start) -> Sample | None:
    if not run.train.validate_every:
        return None
    return sample_of(
        [held_out(folder) for folder in run.questions],
        start.tokenizer,
        start.explainer.markers,
        n=run.train.validation_questions,
        seed=run.seed,
        max_tokens=run.train.max_tokens,
        blind=run.text_only,
    )


def _scratch(run: TrainRun) -> Path:
    """Where shares of this run wait on this machine until they are taken up. What a killed attempt left there is gone,
    so all workers must call it before any of them has a share."""
    folder = storage.own_scratch() / run.name
    if os.environ["LOCAL_RANK"] == "0":
        shutil.rmtree(folder, ignore_errors=True)
    return folder


def _report(engine: Any, state: dict[str, Any], metrics: dict[str, float], scratch: Path, say: Any) -> None:
    """Every worker adds its share; Ray takes them up while the steps go on, and then removes them here. It knows the
    checkpoint once it is whole. A share waits for the one before it, as they would fill the disk otherwise."""
    rank, since = dist.get_rank(), time.monotonic()
    while any(scratch.glob(f"{rank}-*")):
        if time.monotonic() - since > _SECONDS_UNTIL_SAID:
            say.remote(
                "A checkpoint is still being taken up by `storage` where the next one is due, and the training waits "
                "for it: raise `train.checkpoint_every`"
            )
        time.sleep(_SECONDS_BETWEEN_LOOKS)
    folder = scratch / f"{rank}-{state['step']}"
    folder.mkdir(parents=True)
    with storage.told_if_full(str(folder), is_scratch=True):
        save_share(engine, str(folder), state)
    ray.train.report(
        metrics,
        checkpoint=ray.train.Checkpoint.from_directory(folder),
        checkpoint_upload_mode=ray.train.CheckpointUploadMode.ASYNC,
    )


@contextmanager
def _last_checkpoint() -> Iterator[tuple[str | None, dict[str, Any] | None]]:
    """Folder and state of the last checkpoint that is whole, here and on all other workers; None where there is none.

    Ray knows a checkpoint only once all of it was taken up; one that was damaged afterwards is passed over, for any
    other that lies beside it.
    """
    latest = ray.train.get_checkpoint()
    for checkpoint in () if latest is None else _latest_and_others(latest):
        with checkpoint.as_directory() as folder:
            state = state_of(folder)
            whole = torch.tensor(int(state is not None), device=ray.train.torch.get_device())
            dist.all_reduce(whole, op=dist.ReduceOp.MIN)
            if whole:
                yield folder, state
                return
    if latest is not None:
        raise JobFailed("none of the checkpoints is whole: remove the run's folder to start anew")
    yield None, None


def _latest_and_others(latest: ray.train.Checkpoint) -> Iterator[ray.train.Checkpoint]:
    """The latest one, then the others from young to old, in the same order on all workers: a run that was started again
    is told of the latest alone."""
    yield latest
    folder, _, own = latest.path.rpartition("/")
    told: list[list[str]] = [[]]
    if dist.get_rank() == 0:
        assert latest.filesystem is not None  # Ray Train's have one
        found = latest.filesystem.get_file_info(FileSelector(folder))
        names = (info.base_name for info in found if info.type == FileType.Directory)
        told = [sorted((name for name in names if name.startswith("checkpoint_") and name != own), reverse=True)]
    dist.broadcast_object_list(told)
    yield from (ray.train.Checkpoint(f"{folder}/{name}", latest.filesystem) for name in told[0])


class _Best:
    """The explainer with the most exact answers so far, kept as a whole one where the config asks for it.

    It lies in one of two folders, and a file says in which and how good it is: a worker that is lost while a better one
    goes up takes neither along. `folder` is None where the one that is trained is the best itself, or the last is kept.
    """

    def __init__(self, run: TrainRun, root: str, start: Start, watch: Watch) -> None:
        self._run, self._start, self._watch = run, start, watch
        self._place, self.score = best_folder(run, root), -1.0
        self.folder: str | None = None
        if run.train.keep == "best":
            with suppress(FileNotFoundError):  # else of an earlier attempt
                known = storage.read_json(f"{self._place}/{_KEPT}")
                self.score, self.folder = known["score"], f"{self._place}/{'b' if known['folder'] == 'b' else 'a'}"

    def offer(self, engine: Any, score: float, *, last: bool) -> None:
        """Called by all workers. The last one is as good as an equal one before it, and needs no copy."""
        if self._run.train.keep != "best" or score < self.score or (score == self.score and not last):
            return
        self.score = score
        state = None if last else whole_state(engine.module, self._run.train.zero_stage)
        if last:
            self.folder = None
        elif self._watch.first:
            self._keep(engine.module, state)

    def _keep(self, explainer: Explainer, state: dict[str, Tensor] | None) -> None:
        before, name = self.folder, "b" if self.folder == f"{self._place}/a" else "a"
        self.folder = f"{self._place}/{name}"
        with storage.new_folder(self.folder) as folder:
            write_explainer(explainer, self._run, self._start.tokenizer, state, folder)
        storage.write_json({"folder": name, "score": self.score}, f"{self._place}/{_KEPT}")
        if before is not None:
            storage.remove(before)


def write_explainer(
    explainer: Explainer,
    run: TrainRun,
    tokenizer: PreTrainedTokenizerBase,
    state: dict[str, Tensor] | None,
    folder: str,
) -> None:
    """The explainer in `folder`; `state` is its `whole_state`."""
    sidecar = sidecar_of(
        explainer,
        tokenizer,
        target=run.target["name"],
        target_revision=run.target["revision"],
        target_weights=run.target.get("weights"),
        base=run.model["model"],
        base_revision=run.model["revision"],
        wordings={run.wording: wordings.version(run.wording)},
        state_dict=state,
    )
    save_explainer(explainer, folder, sidecar, tokenizer, state_dict=state)


def _save(
    engine: Any,
    run: TrainRun,
    root: str,
    start: Start,
    watch: Watch,
    best: _Best,
    how: Mapping[str, int],
    seconds: float,
) -> None:
    """The explainer's folder and, last, its manifest; written by the first worker, the others give it their shares.
    They do not wait for it: NCCL gives up what waits for half an hour, and 140 GB take longer to be uploaded.

    `how` it was trained at the end: it went on from the checkpoint of step `resumed_at`, 0 without an interruption. One
    that another job has finished meanwhile stays as it is: it may be read by now.
    """
    state = whole_state(engine.module, run.train.zero_stage)
    if watch.first and finished(run.artifact, root) is None:
        with storage.new_folder(run.artifact.path(root)) as folder:
            if best.folder is not None:
                with storage.local_folder(best.folder) as kept:
                    shutil.copytree(kept, folder, dirs_exist_ok=True)
            else:
                write_explainer(engine.module, run, start.tokenizer, state, folder)
            shutil.copy(watch.curve, Path(folder) / CURVE)
        kept_score = {"kept_validation_exact": best.score} if run.train.keep == "best" else {}
        finish(
            run.artifact,
            root,
            rows=len(start.examples),
            dropped=Counter(reason for _, reason in start.dropped),
            seconds=seconds,
            measured={**how, **watch.last, **kept_score},
        )
        storage.remove(best_folder(run, root))
