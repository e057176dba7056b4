"""Models on the Hugging Face hub: fetched by name, pushed with a model card that states their facts."""

import contextlib
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, Self, cast

from huggingface_hub import (
    _CACHED_NO_EXIST,
    HfApi,
    ModelCard,
    PyTorchModelHubMixin,
    constants,
    hf_hub_download,
    try_to_load_from_cache,
)
from huggingface_hub import errors as hub_errors
from torch import Tensor

from visionmoe.config import ModelConfig
from visionmoe.model.pretrained import (
    CONFIG_NAME,
    WEIGHTS_NAME,
    Preprocessing,
    empty_tensor,
    open_pretrained_weights,
    read_pretrained_config,
    write_pretrained,
)
from visionmoe.model.skeleton import skeleton

CARD_NAME = "README.md"
# Of the HTTP library that huggingface_hub uses, which is another one in other versions.
_TRANSPORT_ERROR = cast(type[Exception], hub_errors.HfHubHTTPError.__bases__[0])


class HubModel(
    PyTorchModelHubMixin,
    library_name="visionmoe",
    license="apache-2.0",
    pipeline_tag="image-classification",
    tags=["mixture-of-experts", "vision-transformer"],
):
    """What a model needs for the hub; `from_pretrained` comes from huggingface_hub's mixin.

    Our config.json is no list of __init__'s arguments and is written by `save_pretrained`, so the mixin's ways to read
    and write one are not used.
    """

    config: ModelConfig
    class_names: tuple[str, ...] | None
    preprocessing: Preprocessing

    def save_pretrained(  # type: ignore[override]
        self,
        directory: str | os.PathLike,
        class_names: Sequence[str] | None = None,
        preprocessing: Preprocessing | None = None,
    ) -> None:
        """Writes config.json and model.safetensors, from which `visionmoe.load` makes this model again.

        class_names: kept in config.json, so that fine-tuning knows whether the head is for its classes. preprocessing:
        of the images in evaluation. Both are by default the model's own.
        """
        names = self.class_names if class_names is None else class_names
        state = self.state_dict()  # type: ignore[attr-defined]
        write_pretrained(directory, self.config, state, preprocessing or self.preprocessing, names)

    def push_to_hub(  # type: ignore[override]
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | None = None,
        branch: str | None = None,
        create_pr: bool | None = None,
        commit_message: str = "Upload a visionmoe model",
    ) -> str:
        """Uploads config.json, model.safetensors and a model card in one commit, and returns the commit's URL.

        repo_id: "user/name", made where it is not there yet. branch: one that is there. A model card that is there
        already is kept.
        OSError of one line when the hub refuses or cannot be reached.
        """
        api = HfApi(token=token)
        with hub_mistakes(repo_id), tempfile.TemporaryDirectory() as folder:
            repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
            self.save_pretrained(folder)
            if not api.file_exists(repo_id, CARD_NAME, revision=branch):
                self.generate_model_card(repo_id=repo_id).save(Path(folder) / CARD_NAME)
            commit = api.upload_folder(
                repo_id=repo_id,
                folder_path=folder,
                revision=branch,
                create_pr=create_pr,
                commit_message=commit_message,
            )
        return str(getattr(commit, "commit_url", commit))

    def generate_model_card(self, *, repo_id: str = "USER/NAME") -> ModelCard:
        """The model card: sizes, routing, how to load, licence, citation."""
        template = (files("visionmoe") / "model" / "model_card.md").read_text(encoding="utf-8")
        return ModelCard.from_template(
            self._hub_mixin_info.model_card_data, template_str=template, repo_id=repo_id, facts=_facts(self)
        )

    @classmethod
    def _from_pretrained(
        cls,
        *,
        model_id: str,
        revision: str | None,
        cache_dir: str | os.PathLike | None,
        force_download: bool,
        local_files_only: bool,
        token: str | bool | None,
        config: Any = None,  # what the mixin makes of our config.json, not understanding it
        **options: Any,
    ) -> Self:
        """The hook of the mixin's `from_pretrained`: a folder or a name on the hub, in evaluation mode."""
        if options:
            raise ValueError(
                f"from_pretrained takes no options of the model, got {', '.join(sorted(options))}: "
                f"use visionmoe.load('hf-hub:{model_id}', ...)"
            )
        folder = Path(model_id)
        if not folder.is_dir():
            folder = fetch(
                model_id,
                revision,
                cache_dir,
                force_download=force_download,
                local_files_only=local_files_only,
                token=token,
            )
        return cls._of_folder(folder)

    @classmethod
    def _of_folder(cls, folder: Path) -> Self:
        stored = read_pretrained_config(folder)
        weights = open_pretrained_weights(folder)
        model: Any = skeleton(cls, stored.model)
        model.class_names = stored.class_names
        model.preprocessing = stored.preprocessing or model.preprocessing
        state: dict[str, Tensor] = {n: empty_tensor(t.shape) for n, t in model.state_dict().items()}
        if weights.shapes != {name: tuple(tensor.shape) for name, tensor in state.items()}:
            raise ValueError(f"{weights.path} does not fit the config.json beside it")
        weights.read_into(state)
        model.load_state_dict(state, assign=True)
        return model.eval()


def fetch(
    repo_id: str,
    revision: str | None = None,
    cache_dir: str | os.PathLike | None = None,
    *,
    optional: tuple[str, ...] = (),
    **how: Any,
) -> Path:
    """Downloads config.json and model.safetensors of one revision into huggingface_hub's cache; returns their folder.

    optional: files that are taken where they are. how: token, force_download, local_files_only of `hf_hub_download`.
    FileNotFoundError, PermissionError or ConnectionError of one line.
    """
    how["cache_dir"] = None if cache_dir is None else os.fspath(cache_dir)
    with hub_mistakes(repo_id):
        config = Path(hf_hub_download(repo_id, CONFIG_NAME, revision=revision, **how))
        commit = config.parent.name  # the other files of the same commit, whatever is pushed meanwhile
        hf_hub_download(repo_id, WEIGHTS_NAME, revision=commit, **how)
        for name in optional:
            try:
                hf_hub_download(repo_id, name, revision=commit, **how)
            except hub_errors.LocalEntryNotFoundError:  # offline: whether the repository has it the cache may know
                if try_to_load_from_cache(repo_id, name, how["cache_dir"], commit) is not _CACHED_NO_EXIST:
                    raise
            except hub_errors.EntryNotFoundError:
                continue
    return config.parent


def split_name(name: str) -> tuple[str, str | None]:
    """ "user/name@revision" -> ("user/name", "revision"); without "@" the revision is None."""
    repo_id, _, revision = name.partition("@")
    if repo_id.count("/") > 1 or not repo_id.strip("/"):
        raise ValueError(f"a model on the hub is hf-hub:USER/NAME or hf-hub:USER/NAME@REVISION, got hf-hub:{name}")
    return repo_id, revision or None


@contextlib.contextmanager
def hub_mistakes(repo_id: str) -> Iterator[None]:
    """Within it, what the hub answers becomes an OSError (or ValueError) of one line that names the repository."""
    where = f"the Hugging Face hub ({constants.ENDPOINT})"
    try:
        yield
    except hub_errors.HFValidationError as error:
        raise ValueError(f"{repo_id!r} is no name of a model on the hub: {first_line(error)}") from None
    except hub_errors.GatedRepoError:
        raise PermissionError(f"{repo_id} is gated: ask for access on its page and log in (hf auth login)") from None
    except hub_errors.RepositoryNotFoundError:
        raise FileNotFoundError(
            f"{where} has no {repo_id}, or it is private and you are not logged in (hf auth login)"
        ) from None
    except hub_errors.RevisionNotFoundError:
        raise FileNotFoundError(f"{repo_id} on {where} has no such revision") from None
    except hub_errors.LocalEntryNotFoundError as error:
        raise ConnectionError(
            f"{repo_id} is not in the cache and {where} cannot be reached: {first_line(error)}"
        ) from None
    except hub_errors.EntryNotFoundError as error:
        raise FileNotFoundError(
            f"{repo_id} on {where} is no model of this format (config.json and model.safetensors): {first_line(error)}"
        ) from None
    except hub_errors.HfHubHTTPError as error:
        raise _refusal(error)(f"{where} refused {repo_id}: {first_line(error)}") from None
    except _TRANSPORT_ERROR as error:
        raise ConnectionError(f"{where} cannot be reached for {repo_id}: {first_line(error)}") from None


def _refusal(error: Any) -> type[OSError]:
    status = getattr(getattr(error, "response", None), "status_code", None)
    return PermissionError if status in (401, 403) else ConnectionError


def first_line(error: BaseException) -> str:
    """Of an error's text, for errors of one line; its class where it has no text."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _facts(model: Any) -> Mapping[str, Any]:
    """What the model card says."""
    from visionmoe.model.flops import count_flops

    config: ModelConfig = model.config
    moe, setting = config.moe, config.moe.routing()
    return {
        "sparse": bool(moe.layers),
        "parameters": f"{sum(p.numel() for p in model.parameters()):,}",
        "gflops": f"{count_flops(model) / 1e9:.3f}",
        "image": f"{config.image_hw[0]} x {config.image_hw[1]} x {config.in_channels}",
        "patch": f"{config.patch_hw[0]} x {config.patch_hw[1]}",
        "config": config,
        "layers": ", ".join(str(layer) for layer in sorted(moe.layers)),
        "router": moe.router,
        "setting": setting,
        "order": "batch-priority" if setting.batch_priority else "vanilla",
        "experts": moe.num_experts,
    }
