"""The first parameters of a model that is spread before it has any."""

import torch
from tests.distributed.training import Case, config_of, whole_tensor

import visionmoe as vm
from visionmoe.distributed.layout import Layout
from visionmoe.distributed.world import current
from visionmoe.model.skeleton import materialise, skeleton
from visionmoe.train.parallel import Parallel


def start(layout: str | None, case: Case) -> dict[str, torch.Tensor]:
    model = skeleton(vm.VisionTransformer, config_of(case))
    parallel = Parallel(Layout.parse(layout, current().size), current())
    parallel.spread(model, torch.device("cpu"))
    torch.manual_seed(7)
    materialise(model.to_empty(device="cpu"))
    return {name: whole_tensor(p.detach()).clone() for name, p in model.named_parameters()}
