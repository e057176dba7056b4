"""What several commands do: the output folder, the model, the images, the progress bar."""

import contextlib
import dataclasses
import logging
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from visionmoe.checkpoint.load import load
from visionmoe.checkpoint.sources import model_of_run, on_disk
from visionmoe.checkpoint.store import FOLDER, MANIFEST_NAME, list_checkpoints
from visionmoe.checkpoint.streaming import load_streamed
from visionmoe.cli.options import ModelOnImages
from visionmoe.data.config import DataConfig
from visionmoe.data.loader import EvalLoader
from visionmoe.data.sources import KINDS, may_download
from visionmoe.distributed.world import choose_device, current, first_before_others, own_device
from visionmoe.model.vit import VisionTransformer
from visionmoe.train.config import read_config


def output_folder(path: Path, *, of_run: bool = False) -> Path:
    """Makes the folder and proves that it can be written, before any work is done. OSError names it.

    ValueError for the folder of a training run, whose files other commands would overwrite, unless `of_run`.
    """
    if not of_run and (path / "checkpoints").is_dir():
        raise ValueError(f"--out {path} is the folder of a training run, whose results.json is its own: give another")
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path) as file:
            file.write(b"\0" * 4096)  # a full disk still makes files
        return path
    except OSError as error:  # tempfile's own message names a file that the user has never heard of
        raise OSError(f"cannot write to {path}: {error.strerror}") from None


def check_kept(model: str, folder: Path) -> None:
    """ValueError where the folder that is to be written is the one of the model that is read."""
    if Path(model).resolve() == folder.resolve():
        raise ValueError(f"{folder} holds the model that is read, which would be overwritten: give another --out")


def model_folder(path: str, *, or_checkpoint: bool = False) -> str:
    """The model of a run, where `path` is a run's folder; else `path`.

    ValueError for a run without a model yet, and, unless `or_checkpoint`, for what it resumes from.
    """
    if not path:
        raise ValueError("the model's path is empty")
    folder = Path(path)
    if (model := model_of_run(path)) != path:
        return model
    if (folder / FOLDER).is_dir() or (folder / "log.jsonl").is_file():
        checkpoints = list_checkpoints(folder)
        instead = f", or convert its checkpoint: {_converting(checkpoints[-1][1])}" if checkpoints else ""
        raise ValueError(f"the run in {path} has not finished: it has no folder model yet; resume it{instead}")
    if folder.name == FOLDER and list_checkpoints(folder.parent):
        raise ValueError(f"{path} holds what a run resumes from, no model: give the run, {folder.parent}")
    if (folder / MANIFEST_NAME).is_file() and not or_checkpoint:
        run = folder.parent.parent
        instead = f"give the run, {run}, or convert it" if (run / "model").is_dir() else "convert it first"
        raise ValueError(f"{path} is what a run resumes from, no model: {instead}: {_converting(folder)}")
    return path


def _converting(checkpoint: Path) -> str:
    return f"visionmoe convert {checkpoint} --out DIR"


def load_model(
    path: str, config: Path | None, device: str | None, image_size: int | None = None, *, stream: bool = False
) -> VisionTransformer:
    """The trained model in evaluation mode on the device (None: a GPU where there is one).

    stream: its experts stay in the file, see `visionmoe.checkpoint.streaming`.
    """
    chosen = own_device(choose_device(device))
    overrides: dict[str, Any] = {} if image_size is None else {"image_size": image_size}
    place = model_folder(path)
    if stream:
        if config is not None:
            raise ValueError("--stream reads a folder, which has a config of its own: leave --config out")
        return load_streamed(place, device=chosen, **overrides)
    with first_before_others(when=not on_disk(place)):
        return load(place, config, **overrides).to(chosen)


def evaluation_images(options: ModelOnImages, model: VisionTransformer) -> EvalLoader:
    """The images that the options name, at the model's size; by default those on which a run evaluates itself.

    ValueError when no images are named or they have more classes than the model. Warns where both know their classes'
    names and these differ.
    """
    config = model.config
    if config.num_classes is None:
        raise ValueError("the model has no head (num_classes is None), so it cannot classify")
    given = {
        "source": options.data,
        "eval_split": "test" if options.split is None and options.data is not None else options.split,
        "eval_batch_size": options.batch_size,
        "workers": options.workers,
    }
    changes: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    changes |= {"in_channels": config.in_channels}
    run = data_of_run(options.path, required=options.data is None).at_size(config.image_size)
    if model.preprocessing.resize_to is not None:
        changes["eval_resize"] = model.preprocessing.resize_to
    data = dataclasses.replace(run, **changes)
    loader = open_loader(data)
    if loader.num_classes > config.num_classes:
        raise ValueError(f"the model has {config.num_classes} classes, {data.source} has {loader.num_classes}")
    difference = names_differ(model.class_names, loader.class_names)
    if difference is not None:
        number, own, other = difference
        logging.getLogger(__name__).warning(
            "class %d is %r for the model and %r in %s: classes are compared by number", number, own, other, data.source
        )
    return loader


def open_loader(data: DataConfig) -> EvalLoader:
    """The images; of several processes the first one is the first to ask a library that may fetch them."""
    with first_before_others(when=may_download(data.source)):
        return EvalLoader(data)


def names_differ(model_names: Sequence[str] | None, data_names: Sequence[str]) -> tuple[int, str, str] | None:
    """The first class with two names: (number, the model's, the data's). Numbers in the place of names are no names."""
    if model_names is None or any(all(name.isdecimal() for name in names) for names in (model_names, data_names)):
        return None
    pairs = enumerate(zip(model_names, data_names, strict=False))  # the data may have fewer classes
    return next(((number, own, other) for number, (own, other) in pairs if own != other), None)


def data_of_run(path: str, *, required: bool) -> DataConfig:
    """The images of the run in `path`; where there is no run, the defaults, or ValueError when `required`."""
    folder = Path(path)  # tune and others leave a model, too, but no config of images beside it
    if (folder / "model" / "config.json").is_file() and (folder / "config.json").is_file():
        return read_config(str(Path(path) / "config.json")).data
    if required:
        raise ValueError(f"{path} is no run that says its images: give --data, one of {KINDS}")
    return DataConfig()


@contextlib.contextmanager
def progress(title: str, total: int) -> Iterator[Callable[[int], None]]:
    """A progress line on stderr where that is a terminal; yields the function that advances it.

    Of several processes the first one shows it.
    """
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal or not current().is_first) as bar:
        task = bar.add_task(title, total=total)
        yield lambda amount: bar.advance(task, amount)
