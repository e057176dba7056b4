"""The options of every command. No torch here: this is imported at start-up."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

Integer = Annotated[int | None, tyro.conf.arg(metavar="INT")]
Number = Annotated[float | None, tyro.conf.arg(metavar="FLOAT")]
Text = Annotated[str | None, tyro.conf.arg(metavar="TEXT")]
Folder = Annotated[Path | None, tyro.conf.arg(metavar="DIR")]
File = Annotated[Path | None, tyro.conf.arg(metavar="FILE")]
Switch = Annotated[bool | None, tyro.conf.arg(metavar="{True,False}")]
ModelPath = Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="PATH")]
Texts = Annotated[tuple[str, ...], tyro.conf.arg(metavar="TEXT [TEXT ...]")]
BenchSection = Literal["ceilings", "layer", "share", "adaptive", "models", "growth", "memory"]
Assignments = Annotated[tyro.conf.UseAppendAction[tuple[str, ...]], tyro.conf.arg(name="set", metavar="NAME=VALUE")]


@dataclass(frozen=True)
class Train:
    """Train a model from a recipe or a config file."""

    recipe: Text = None
    """Recipe: fashion_mnist (the default), cifar10_small, either with _dense for its dense twin, imagenet21k
    or imagenet1k."""
    config: File = None
    """config.json of an earlier run, to repeat it."""
    out: Folder = None
    """Folder of the run. Default: runs/RECIPE."""
    data: Text = None
    """Training and test images: fashion-mnist, folder:PATH, parquet:PATH, wds:SHARDS (WebDataset, as
    wds:PATH/{000..127}.tar), torchvision:CIFAR10, hf:NAME, hf-stream:NAME (not downloaded first)."""
    model: Text = None
    """Model name, such as vmoe_b16_e8_every2, in the place of the recipe's."""
    steps: Integer = None
    """Length of the run in steps."""
    epochs: Number = None
    """Length of the run in passes over the training images."""
    assignments: Assignments = ()
    """Any field of the run's config, e.g. optimizer.learning_rate.peak_value=0.001. May be repeated."""
    resume: bool = False
    """Continue the run in --out from its last checkpoint."""
    nproc: Integer = None
    """Processes on this machine that train together, as torchrun would start them."""
    parallel: Text = None
    """How they share the work, e.g. dp=2,ep=2: data parallel, fully sharded (fsdp), experts split (ep). Their product
    is the number of processes. Default: all data parallel."""


@dataclass(frozen=True)
class Finetune:
    """Fine-tune a trained model: other images, another resolution, all of it or a part."""

    path: ModelPath
    """A run, a folder that save_pretrained wrote, a released checkpoint's name, or its PREFIX with --model-config."""
    data: Text = None
    """Images, as for train. Default: those of the run, or of the recipe."""
    recipe: Text = None
    """Recipe: finetune (the default), finetune_imagenet or finetune_cifar10."""
    model_config: File = None
    """config.json of a released PREFIX."""
    out: Folder = None
    """Folder of the run. Default: runs/RECIPE."""
    steps: Integer = None
    """Length of the run in steps."""
    epochs: Number = None
    """Length of the run in passes over the training images."""
    image_size: Integer = None
    """Pixels, in the place of the recipe's; position embeddings are resized."""
    head: Literal["auto", "keep", "new"] = "auto"
    """The classifier: auto keeps it where the checkpoint has the same classes as the images, else it starts anew."""
    layer_decay: Number = None
    """Factor in (0, 1] by which the rate falls from each block to the one before it."""
    freeze: Annotated[tuple[str, ...], tyro.conf.arg(metavar="PATTERN [PATTERN ...]")] = ()
    """Regular expressions: parameters whose names match one of them stay as they are, e.g. ^patch_embed pos_embed."""
    freeze_router: bool = False
    """The routers stay as they are."""
    assignments: Assignments = ()
    """Any field of the run's config. May be repeated."""
    resume: bool = False
    """Continue the run in --out from its last checkpoint."""
    nproc: Integer = None
    """Processes on this machine that train together, as torchrun would start them."""
    parallel: Text = None
    """How they share the work, e.g. dp=2,ep=2: data parallel, fully sharded (fsdp), experts split (ep). Their product
    is the number of processes. Default: all data parallel."""


@dataclass(frozen=True)
class ModelOnImages:
    """What the commands have in common that run a trained model over labelled images."""

    path: ModelPath
    """A run, a folder that save_pretrained wrote, a released checkpoint's name, or its PREFIX with --config."""
    data: Text = None
    """fashion-mnist, folder:PATH, parquet:PATH, wds:SHARDS, torchvision:CIFAR10, hf:NAME, hf-stream:NAME.
    Default: those of the run."""
    split: Text = None
    """Part of the data that results are for, e.g. test or train[99%:]. Default: test, or that of the run."""
    config: File = None
    """config.json of a released PREFIX."""
    batch_size: Integer = None
    """Images per forward pass; they compete for the experts' places."""
    workers: Integer = None
    """Processes that decode images."""
    bf16: bool = False
    """Compute in bfloat16 where that is safe."""
    device: Text = None
    """cpu, cuda, ... Default: a GPU where there is one."""
    nproc: Integer = None
    """Processes on this machine that share the work, as torchrun would start them."""


@dataclass(frozen=True)
class Evaluate(ModelOnImages):
    """Accuracy of a trained model on labelled images."""

    num_selected_experts: Integer = None
    """Experts per token (K) in the place of the model's own."""
    capacity_factor: Number = None
    """Capacity factor in the place of the model's own."""
    batch_priority: Switch = None
    """Batch-priority routing in the place of the model's own order."""
    image_size: Integer = None
    """Pixels, in the place of the model's own size; position embeddings are resized."""
    stream: bool = False
    """Leave the experts in model.safetensors and read them when tokens need them: for models larger than the memory.
    The model computes in the dtype in which its experts are stored."""
    out: Path = Path("out/evaluate")
    """Where results.json goes."""


@dataclass(frozen=True)
class Sweep(ModelOnImages):
    """Accuracy against compute and time: the same weights at many routing settings."""

    capacity_factors: tuple[float, ...] = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1)
    """Capacity factors to try."""
    num_selected_experts: tuple[int, ...] = ()
    """Experts per token (K) to try. Default: the model's own."""
    order: Literal["vanilla", "batch-priority", "both"] = "both"
    """Which tokens find a place first: by position, or by the router's confidence."""
    layers: tuple[int, ...] = ()
    """Blocks whose routing changes while the others keep their own. Default: all with experts."""
    dense: Text = None
    """A dense model to compare with on the same images: a run, a folder, a published name or a PREFIX."""
    dense_config: File = None
    """config.json of a released dense PREFIX or .npz."""
    out: Path = Path("out/sweep")
    """Where results.json and the pictures go; started again, finished points are not evaluated again."""


@dataclass(frozen=True)
class Tune(ModelOnImages):
    """Find the best routing of every layer for a budget of operations or a speed."""

    flops: Number = None
    """Budget: share of the operations per image that the model needs at its present setting, e.g. 0.6."""
    images_per_second: Number = None
    """Budget: the speed that the model shall reach on this machine at this batch size."""
    calibration_split: Text = None
    """Part of the data that settings are chosen on, e.g. train[:2000]. Default: 4000 of the training images."""
    out: Path = Path("out/tune")
    """Where the tuned model, results.json and tuned_routing.png go; started again, it goes on where it was."""


@dataclass(frozen=True)
class Analyze(ModelOnImages):
    """What the routers learned: a report of pictures and numbers over labelled images."""

    seeds: int = 3
    """Draws of random routers, each evaluated for every layer by itself and from the bottom up; 0: none."""
    permutations: int = 10
    """Shuffles of the labels that show what mutual information chance alone gives; 0: none."""
    gallery: int = 12
    """Patches shown per expert."""
    out: Path = Path("out/analyze")
    """Where report.html, results.json and the pictures go; the same command there continues what was stopped."""


@dataclass(frozen=True)
class Fewshot:
    """Few-shot accuracy of frozen features: ridge regression on k images per class."""

    path: ModelPath
    """A trained model, as for evaluate; it needs no head."""
    data: Annotated[tuple[str, ...], tyro.conf.arg(metavar="DATA [DATA ...]")]
    """One or more data sets: fashion-mnist, folder:PATH, parquet:PATH, wds:SHARDS, torchvision:CIFAR10, hf:NAME,
    hf-stream:NAME."""
    shots: tuple[int, ...] = (1, 5, 10, 25)
    """Training images per class."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Each selects other images; mean and spread are reported."""
    train_split: Texts = ("train",)
    """Where the images to learn from are selected: one for all data sets, or one for each."""
    test_split: Texts = ("test",)
    """Images to classify: one for all data sets, or one for each."""
    config: File = None
    """config.json of a released PREFIX."""
    num_selected_experts: Integer = None
    """Experts per token (K) in the place of the model's own."""
    capacity_factor: Number = None
    """Capacity factor in the place of the model's own."""
    batch_priority: Switch = None
    """Batch-priority routing in the place of the model's own order."""
    image_size: Integer = None
    """Pixels, in the place of the model's own size; position embeddings are resized."""
    eval_resize: Integer = None
    """Resize the smaller side to so many pixels and crop the centre. Default: as the model says."""
    batch_size: Integer = None
    """Images per forward pass."""
    workers: Integer = None
    """Processes that decode images."""
    bf16: bool = False
    """Compute features in bfloat16 where that is safe."""
    device: Text = None
    """cpu, cuda, ... Default: a GPU where there is one."""
    nproc: Integer = None
    """Processes on this machine that share the work, as torchrun would start them."""
    cache: Folder = None
    """Where features are kept, for other shots and seeds and for going on after a stop. Default: OUT/features."""
    refresh: bool = False
    """Compute all features anew."""
    out: Path = Path("out/fewshot")
    """Where results.json and fewshot.png go."""


@dataclass(frozen=True)
class Convert:
    """Convert a checkpoint from the released format to safetensors, or back."""

    path: ModelPath
    """PREFIX of a released checkpoint (PREFIX.index), a .npz, a folder that convert or save_pretrained wrote, or a
    run's checkpoint (RUN/checkpoints/step_XXXXXXXX)."""
    out: Annotated[Path, tyro.conf.arg(metavar="DIR")]
    """Folder to write."""
    config: File = None
    """The model's config.json: ours, or the reference's own with its image_size."""
    to: Literal["safetensors", "vmoe"] = "safetensors"
    """Format to write."""
    shards: int = 1
    """Number of data files with --to vmoe."""
    averaged: bool = False
    """Of a run's checkpoint: the averaged parameters."""


@dataclass(frozen=True)
class Info:
    """Parameters, operations, layers and routing of a model."""

    model: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="MODEL")]
    """A model name (vmoe_b16_e8_every2), a config.json, or a folder that save_pretrained wrote."""
    image_size: Integer = None
    """Pixels, in the place of the model's own size."""
    num_classes: Integer = None
    """Classes, in the place of the model's own number."""
    out: Path = Path("out/info")
    """Where results.json goes."""


@dataclass(frozen=True)
class Upcycle:
    """Turn a dense ViT into a V-MoE: its MLPs become the experts."""

    path: ModelPath
    """timm:NAME, hf-hub:USER/NAME, a folder (ours, timm's, transformers'), a .safetensors of timm, a .npz, a run."""
    out: Annotated[Path, tyro.conf.arg(metavar="DIR")]
    """Folder to write: config.json, model.safetensors, results.json."""
    config: File = None
    """config.json of a released PREFIX, or of a .npz whose shapes do not say it."""
    timm_model: Text = None
    """The timm model whose parameters a .safetensors file holds."""
    layers: tuple[int, ...] = ()
    """Blocks that get experts, counted from 0. Default: by --placement."""
    placement: Literal["every2", "last2", "last5"] = "every2"
    """Every second block (1, 3, 5, ...), or the last two or five of those."""
    num_experts: int = 8
    """Experts per layer."""
    num_selected_experts: int = 2
    """Experts per token (K)."""
    capacity_factor: float = 2.0
    """Capacity factor of the new model."""
    noise: float = 0.0
    """Standard deviation of noise on the experts, relative to that of each of their tensors."""
    router_std: Number = None
    """Standard deviation of the new routers' weights. Default: as for a new model (LeCun)."""
    normalize_weights: bool = True
    """Let the weights of a token's experts sum to 1: the new model starts as the dense one."""
    seed: int = 0
    """Of the noise and the routers."""
    data: Text = None
    """Images to compare the two models on, as for evaluate. Default: random ones."""
    split: Text = None
    """Part of --data, e.g. train. Default: test."""
    images: int = 8
    """How many images to compare on."""


@dataclass(frozen=True)
class Bench:
    """Measure this machine: the MoE layer and whole models against dense ones, in turns."""

    sections: tuple[BenchSection, ...] = ("ceilings", "layer", "share", "adaptive", "models", "growth", "memory")
    """What to measure."""
    quick: bool = False
    """Small shapes and few rounds, to see that it runs: about a minute, and no targets."""
    device: Text = None
    """cpu, cuda, ... Default: cpu."""
    out: Path = Path("out/bench")
    """Where results.json and the pictures go; started again, what was measured is not measured again."""


@dataclass(frozen=True)
class Plan:
    """What a model needs on given devices: memory, operations, traffic, time, and which layout fits."""

    model: str
    """A model name (vmoe_15b), a config.json, a folder that save_pretrained wrote, or a run."""
    devices: int = 1
    """How many."""
    memory: str = "80GB"
    """Of one device: 80GB, 80GiB, 500MB, ..."""
    batch_size: Integer = None
    """Images of one step over all devices. Default: 32 per device."""
    accumulation: int = 1
    """Parts in which each device runs its images of a training step."""
    mode: Literal["train", "inference"] = "train"
    """A training step, or one call without gradients."""
    precision: Literal["float32", "bfloat16"] = "bfloat16"
    """Of the products in training (parameters are float32), of everything in inference."""
    optimizer: Literal["adam", "sgd", "adafactor"] | None = None
    """As in training; sgd has momentum 0.9. Default: adam, for vmoe_15b adafactor, as in the recipes."""
    momentum_dtype: Literal["float32", "bfloat16"] | None = None
    """In which the optimizer keeps its momentum (Adam: the first moment). Default: float32, adafactor bfloat16."""
    layout: Text = None
    """dp=2,fsdp=1,ep=4: replicas, shards of the parameters, parts of the experts. Default: all that there are."""
    image_size: Integer = None
    """Pixels, in the place of the model's own size."""
    num_classes: Integer = None
    """Classes, in the place of the model's own number."""
    num_experts: Integer = None
    """Experts per layer, in the place of the model's own."""
    num_selected_experts: Integer = None
    """Experts per token (K), in the place of the model's own."""
    capacity_factor: Number = None
    """Capacity factor, in the place of the model's own."""
    device: Literal["h100", "a100", "cpu"] = "h100"
    """Whose rates are taken (data sheets), and whether the experts run as on a GPU or as on a CPU."""
    flops_rate: Number = None
    """TFLOP/s of one device, in the place of the data sheet's."""
    bandwidth: Number = None
    """GB/s of a device's memory, in the place of the data sheet's."""
    link_bandwidth: Number = None
    """GB/s that a device sends to others, in the place of the data sheet's."""
    out: Path = Path("out/plan")
    """Where results.json and plan.png go."""
