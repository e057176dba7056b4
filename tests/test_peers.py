"""benchmarks/peers: every peer that is installed does the same work; one that is not is named with what installs it."""

import json
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
PEERS = ROOT / "benchmarks" / "peers"


@pytest.fixture
def peers(monkeypatch: pytest.MonkeyPatch):
    """Imports the scripts as they import each other, and forgets them afterwards."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(str(PEERS))
    import importlib

    yield importlib.import_module
    for name in set(sys.modules) - before:
        if str(PEERS) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


def test_quick_run(peers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "peers.json"
    monkeypatch.setattr(sys, "argv", ["run.py", "--quick", "--rounds", "1", "--out", str(out), "--peers",
                                      "torch_grouped_mm", "scattermoe_gpu"])  # fmt: skip
    peers("run").main()
    found = json.loads(out.read_text())
    names = {"visionmoe MoE layer", "dense F.linear MLP over as many rows", "torch grouped_mm (as in torchtitan)"}
    assert {row["name"] for row in found["rows"]} == names
    assert len(found["rows"]) == 3 * 4  # forward with and without backward, two dtypes
    assert all(row["time_over_ours"] == 1 for row in found["rows"] if row["name"] == "visionmoe MoE layer")
    assert found["missing"] == {"scattermoe_gpu": "runs on a GPU alone"}
    assert "scattermoe_gpu: runs on a GPU alone" in capsys.readouterr().out


def test_a_peer_that_is_not_installed_is_named(peers, monkeypatch: pytest.MonkeyPatch):
    common, peer = peers("common"), peers("jax_ragged_dot")
    monkeypatch.setitem(sys.modules, "jax", None)  # what import finds where there is no such package
    work = common.LayerWork(*[torch.zeros(2, 2)] * 6, num_selected_experts=1)
    with pytest.raises(common.MissingError, match="not installed: pip install jax"):
        peer.layer_calls(work)


def test_other_work_is_refused(peers):
    run = peers("run")

    class Peer:
        @staticmethod
        def layer_calls(work: object) -> dict:
            return {"half of it": lambda: 0.5 * torch.ones(3, 2)}

    with pytest.raises(RuntimeError, match=r"half of it does other work: its output differs by 0\.5 of the largest"):
        run.checked(Peer, None, torch.ones(3, 2), 1e-4)
