"""The training loop. A run is a folder; whatever ends it, it goes on from there with bitwise the same parameters.

    OUT/config.json    the resolved config: repeats the run        OUT/log.jsonl      what happened (`log`)
    OUT/checkpoints/   to resume from (`checkpoint.store`)         OUT/results.json   the outcome
    OUT/model/         the trained model, for `visionmoe.load`

Nothing random is carried from step to step: the order of images, their augmentation, mixup, router noise and dropout
follow from (seed, step), so the parameters, the optimizer and the step's number are the whole state. Bitwise means: on
the CPU with as many threads as before; on a GPU some of torch's sums depend on the order in which threads arrive.
"""

import contextlib
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from visionmoe.checkpoint.sharded import AsyncSaver
from visionmoe.checkpoint.sharded_model import save_pretrained_sharded
from visionmoe.checkpoint.store import list_checkpoints
from visionmoe.config import to_dict
from visionmoe.data.loader import TrainLoader
from visionmoe.distributed.world import choose_device, from_first, gather, joined, own_device
from visionmoe.files import disk_fault, write_json
from visionmoe.model.flops import count_flops
from visionmoe.model.pretrained import Preprocessing
from visionmoe.train.config import TrainConfig
from visionmoe.train.log import History, Means, RunLog, read_log, router_health
from visionmoe.train.progress import ProgressLine
from visionmoe.train.setup import Parts, prepare
from visionmoe.train.signals import StopRequest, exit_code, stop_on_signals
from visionmoe.train.state import training_state
from visionmoe.train.step import StepResult, train_step

Evaluator = Callable[[nn.Module, int], Mapping[str, Any]]
"""(model, step) -> names and numbers, at least the "top1" by which the best step is noted, where it has one."""

FEWSHOT = "fewshot"
"""Name of the evaluator that is due by config.fewshot.every; all others are by config.eval_every."""


class TrainingDivergedError(ValueError):
    """Too many steps in a row had a loss or gradient that was not finite."""


def run_training(
    config: TrainConfig,
    evaluators: Mapping[str, Evaluator] | None = None,
    *,
    resume: bool = False,
    show_progress: bool = True,
) -> dict[str, Any]:
    """Trains as `config` says and returns what it also writes to OUT/results.json.

    resume: go on from the newest good checkpoint in OUT (from the start where there is none yet).
    results["status"]: "finished", or "interrupted" by SIGTERM or Ctrl-C after saving; results["exit_code"] is 0, or 143
    or 130. The caller's random state is left as it was.
    In processes that torchrun started the run is theirs together, as config.parallel says: the first one writes, all
    evaluators are called on all of them, and all get the results.
    Raises ValueError for a config that cannot be run, TrainingDivergedError (a ValueError), OSError for a full disk,
    and LostRankError where another process of the job has ended.
    """
    with joined(), full_disk_named(config.out):
        device = own_device(choose_device(config.device))
        with torch.random.fork_rng([device] if device.type == "cuda" else []), stop_on_signals() as stop:
            trainer = Trainer(prepare(config, resume), dict(evaluators or {}), stop, show_progress)
            try:
                return trainer.run()
            finally:
                trainer.close()


@contextlib.contextmanager
def full_disk_named(out: str) -> Iterator[None]:
    """Within it, an OSError because no more can be written names the run's folder and says what is there."""
    try:
        yield
    except OSError as error:
        fault = disk_fault(error)
        if fault is None:
            raise
        checkpoints = list_checkpoints(out)
        kept = f"{checkpoints[-1][1]} is kept, resume goes on there" if checkpoints else "no checkpoint is there yet"
        raise OSError(f"cannot write to {out}: {fault}; {kept}") from error


class Trainer:
    """A run in progress: the parts that `setup.prepare` made, and the loop over them."""

    def __init__(
        self, parts: Parts, evaluators: Mapping[str, Evaluator], stop: StopRequest, show_progress: bool
    ) -> None:
        self.parts = parts
        self.config = parts.config
        self.progress = parts.progress
        self.evaluators = evaluators
        self.stop = stop
        self.total = parts.total_steps
        self.parallel = parts.parallel
        first = self.parallel.world.is_first
        self.log = RunLog(self.config.out, self.progress.step, self.config.tensorboard, silent=not first)
        self.line = ProgressLine(self.total, self.progress.step, show_progress and first)
        self.means = Means()
        self.history = History(best=dict(self.progress.best or {}))
        if parts.resumed_from is not None:
            for record in from_first(
                read_log(self.log.path) if first else []
            ):  # what follows the checkpoint is gone by now
                self.history.add(record)
        self.progress.best = self.history.best
        self.finished = False
        self._stopping = False
        self._stopped_by: str | None = None
        self.saver = AsyncSaver()
        self._saved = None if parts.resumed_from is None else self.progress.step
        self._interval_start = self.progress.step
        self._interval_seconds = 0.0

    def run(self) -> dict[str, Any]:
        world = self.parallel.world
        loader = TrainLoader(
            self.config.data,
            self.config.seed,
            start_step=self.progress.step,
            rank=world.rank,
            world_size=world.size,
            source=self.parts.source,
        )
        with self.line:
            for note in self.parts.notes:
                self._event(note)
            self.parts.model.train()
            if self.parts.resumed_from is not None:
                self._evaluate_due()  # the checkpoint is from before this step's evaluation
            batches = iter(loader)
            try:
                self._agreed_to_stop()
                while self.progress.step < self.total and not self._stopping:
                    if not self._step(batches):
                        break
            finally:
                del batches  # ends the worker processes
            self._end()
        return self._results("finished" if self.finished else "interrupted", loader.broken)

    def _step(self, batches: Iterator[tuple[Tensor, Tensor]]) -> bool:
        """One step and what is due after it. False when a signal ended the worker processes too."""
        start = time.perf_counter()
        try:
            images, labels = next(batches)
        except RuntimeError:
            if self.stop and self.parallel.world.size == 1:
                self._stopping = True
                return False
            raise
        device = self.parts.device
        result = train_step(
            self.parts.forward,
            self.parts.optimizer,
            images.to(device, non_blocking=True),
            labels.to(device, non_blocking=True),
            self.progress.step,
            self.parts.settings,
            self.parallel,
        )
        if result.applied and self.parts.ema is not None:
            self.parts.ema.update()
        self.progress.step += 1
        self._count(result)
        seconds = time.perf_counter() - start
        self._interval_seconds += seconds
        self.progress.seconds += seconds
        self.line.advance()
        self._agreed_to_stop()
        self._due()
        return True

    def close(self) -> None:
        """Ends what goes on beside the loop, whatever ended that."""
        self.log.close()
        with contextlib.suppress(OSError, ValueError, RuntimeError):  # a run that ended well has waited before
            self.saver.wait()

    def _agreed_to_stop(self) -> bool:
        """Whether a process of the job was asked to stop; all of them hear of it at the same place."""
        self._stopping = self._stopping or self.parallel.any(bool(self.stop))
        return self._stopping

    def _count(self, result: StepResult) -> None:
        """Keeps the step's numbers; a step that was not finite is counted, and too many in a row end the run."""
        progress = self.progress
        if result.applied:
            progress.skipped_in_a_row = 0
            losses = {"main_loss": result.main_loss, "auxiliary_loss": result.auxiliary_loss}
            self.means.add({**losses, "accuracy": result.accuracy, "grad_norm": result.grad_norm, **result.metrics})
            return
        progress.skipped_steps += 1
        progress.skipped_in_a_row += 1
        loss, auxiliary_loss = (self.parallel.mean(x).item() for x in (result.main_loss, result.auxiliary_loss))
        self._event(
            f"skipped step {progress.step}: loss {loss:.4g}, auxiliary loss {auxiliary_loss:.4g}, gradient norm "
            f"{result.grad_norm.item():.4g} are not all finite"
        )
        if progress.skipped_in_a_row >= self.config.max_nonfinite:
            message = (
                f"stopped at step {progress.step}: {progress.skipped_in_a_row} steps in a row had a loss or gradient "
                f"that is not finite (a lower learning rate or gradient_clip may help); {self.config.out} is as it was "
                f"at its last checkpoint"
            )
            self._event(message)
            self._write(self._summary("diverged"))
            raise TrainingDivergedError(message)

    def _due(self) -> None:
        """Logs, evaluates and saves where this step is due."""
        config, step = self.config, self.progress.step
        if step % config.log_every == 0 or step == self.total or self._stopping:
            self._log_train()
        if config.checkpoint_every and step % config.checkpoint_every == 0 and step < self.total:
            self._save()  # first, so that nothing is lost when the evaluation fails or is killed
        self._evaluate_due()

    def _evaluate_due(self) -> None:
        config, step = self.config, self.progress.step
        if step < self.total and not self._stopping:
            every = {name: config.eval_every for name in self.evaluators} | {FEWSHOT: config.fewshot.every}
            due = [name for name in self.evaluators if (n := every[name]) and step % n == 0]
            self._evaluate(due)
            if due:  # it may have taken long
                self._agreed_to_stop()

    def _end(self) -> None:
        if self._stopping:
            self._save()
            path = self.saver.wait() or self.parts.resumed_from
            self._stopped_by = next(filter(None, gather(self.stop.name)))  # it may have come to one process alone
            self._event(
                f"{self._stopped_by}: saved {path} and stopped at step {self.progress.step}; resume goes on here"
            )
            return
        self._save()
        model, class_names = self.parts.model, self.parts.source.class_names
        with self.parts.averaged():
            folder = Path(self.config.out) / "model"
            save_pretrained_sharded(model.state_dict(), model.config, folder, self._preprocessing(), class_names)
        self._evaluate(self.evaluators)
        self.saver.wait()
        self.finished = True

    def _preprocessing(self) -> Preprocessing:
        return Preprocessing.of(self.parts.model.config, self.config.data.eval_resize)

    def _log_train(self) -> None:
        means = self.means.take(self.parallel.mean)
        steps = self.progress.step - self._interval_start
        seconds = max(self._interval_seconds, 1e-9)
        shared = {name: value.item() for name, value in means.items() if "." not in name}
        names = ("main_loss", "auxiliary_loss", "accuracy", "grad_norm")
        record = self.log.write(
            "train",
            self.progress.step,
            **{name: shared.get(name) for name in names},
            learning_rate=self.parts.optimizer.last_rate,
            images_per_second=steps * self.config.data.batch_size / seconds,
            eta_seconds=(self.total - self.progress.step) * seconds / max(steps, 1),
            skipped_steps=self.progress.skipped_steps,
            router=router_health({name: value for name, value in means.items() if "." in name}),
        )
        self.line.show(record)
        self.history.add(record)
        self._interval_start, self._interval_seconds = self.progress.step, 0.0

    def _evaluate(self, names: Collection[str]) -> None:
        """Runs the evaluators of these names that have not yet seen this step."""
        names = [name for name in names if self.history.eval_steps.get(name) != self.progress.step]
        if not names:
            return
        with self.parts.averaged():
            for name in names:
                metrics = self.evaluators[name](self.parts.model, self.progress.step)
                record = self.log.write("eval", self.progress.step, name=name, metrics=metrics)
                self.history.add(record)
                self.line.show(record)
        self.parts.model.train()

    def _save(self) -> None:
        """Saves a checkpoint, unless this step's is there already. Others than one process on a CPU go on meanwhile."""
        parts, step = self.parts, self.progress.step
        if self._saved != step:
            tensors, values = training_state(parts.model, parts.optimizer, parts.ema, self.progress)
            values |= {
                "preprocessing": to_dict(self._preprocessing()),
                "class_names": list(parts.source.class_names),
            }
            self.saver.save(self.config.out, step, tensors, values, self.config.keep_last)
            self._saved = step
        if self.parallel.world.size == 1 and parts.device.type == "cpu":
            self.saver.wait()  # writing would only take the cores from the next steps

    def _event(self, message: str) -> None:
        self.line.show(self.log.write("event", self.progress.step, message=message))

    def _summary(self, status: str) -> dict[str, Any]:
        progress, config = self.progress, self.config
        images = progress.step * config.data.batch_size
        return {
            "status": status,
            "exit_code": {"finished": 0, "diverged": 1}.get(status, exit_code(self._stopped_by)),
            "step": progress.step,
            "total_steps": self.total,
            "images_seen": images,
            "skipped_steps": progress.skipped_steps,
            "train_seconds": progress.seconds,
            "images_per_second": images / progress.seconds if progress.seconds else None,
        }

    def _results(self, status: str, broken: Mapping[str, str]) -> dict[str, Any]:
        model = self.parts.model
        results = {
            **self._summary(status),
            "num_parameters": sum(p.numel() for p in model.parameters()),
            "flops_per_image": count_flops(model),
            "eval": self.history.evals,
            "best": self.history.best,
            "train": self.history.train,
            "broken_images": {name: why for of_rank in gather(dict(broken)) for name, why in of_rank.items()},
            "model": str(Path(self.config.out) / "model") if status == "finished" else None,
        }
        self._write(results)
        return results

    def _write(self, results: Mapping[str, Any]) -> None:
        if self.parallel.world.is_first:
            write_json(Path(self.config.out) / "results.json", results)
