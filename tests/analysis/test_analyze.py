"""The command analyze: every file, a report that needs nothing else, and stages that are not done twice."""

import base64
import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import visionmoe as vm
from visionmoe.analysis import figures
from visionmoe.analysis.analyze import Analysis, AnalysisConfig
from visionmoe.analysis.explain import _classes, _facts, _positions, _weights
from visionmoe.analysis.gallery import Crop
from visionmoe.analysis.html import Section, Table, page
from visionmoe.analysis.pictures import spread_batch
from visionmoe.cli import main
from visionmoe.config import to_dict
from visionmoe.data import DataConfig, EvalLoader
from visionmoe.data.sources import ArraySource

CONFIG = vm.ModelConfig(
    image_size=28, patch_size=7, in_channels=1, num_classes=10, hidden_size=16, num_layers=3, mlp_dim=16, num_heads=2,
    moe=vm.MoEConfig(num_experts=4, layers=(1, 2)),
)  # fmt: skip
IMAGES = ["--data", "fashion-mnist", "--split", "test[:90]", "--batch-size", "40"]


def make(**overrides: object) -> vm.VisionTransformer:
    torch.manual_seed(0)
    model = vm.create_model(CONFIG.replace(**overrides))
    torch.nn.init.normal_(model.head.weight)
    return model.eval()


@pytest.fixture(scope="module")
def analyzed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("analyze")
    make().save_pretrained(folder / "model")
    options = ["--seeds", "2", "--permutations", "2", "--gallery", "3", "--out", str(folder / "out")]
    assert main(["analyze", str(folder / "model"), *IMAGES, *options]) == 0
    return folder / "out"


def test_results_and_pictures(analyzed: Path):
    results = json.loads((analyzed / "results.json").read_text())
    assert results["num_images"] == 90
    assert list(results["layers"]) == ["1", "2"]
    for layer in results["layers"].values():
        assert np.sum(layer["load"]["share"]) == pytest.approx(1)
        assert layer["load"]["requests"] == 90 * 17 * 2  # 16 patches and the class token, two experts each
        assert [len(line) for line in layer["gallery"]] == [3] * 4
        assert np.sum(layer["combine_weights"]["counts"], axis=1).tolist() == [90 * 17] * 2
        for kind in ("class", "position"):
            assert layer["information"][kind]["first"]["bits"] >= 0
    random = results["random_routers"]
    assert random["trained"]["top1"] == results["top1"]
    assert [len(random["cumulative"][n]["top1"]) for n in ("1", "2")] == [2, 2]
    assert set(results["pictures"]) == {p.name for p in analyzed.iterdir()} - {"results.json", "state"}
    for name in set(results["pictures"]) - {"report.html"}:
        with Image.open(analyzed / name) as picture:
            picture.load()
            assert min(picture.size) >= 150
            assert np.asarray(picture.convert("L")).std() > 5


def test_the_report_needs_nothing_else(analyzed: Path):
    text = (analyzed / "report.html").read_text()
    results = json.loads((analyzed / "results.json").read_text())
    sources = re.findall(r'src="([^"]*)"', text)
    assert len(sources) == len(results["pictures"]) - 1  # all but the report itself
    for source in sources:
        kind, _, data = source.partition(";base64,")
        with Image.open(io.BytesIO(base64.b64decode(data, validate=True))) as picture:
            assert kind == f"data:image/{picture.format.lower()}"
    without = re.sub(r'src="data:[^"]*"', "", text)
    for outside in ("http:", "https:", "//", "url(", "@import", "<script", "<link", "src=", "javascript"):
        assert outside not in without, outside
    targets = re.findall(r'href="#([^"]+)"', without)
    assert len(targets) == without.count("<a ") == without.count("<section id=")
    assert all(f'id="{target}"' in without for target in targets)
    assert 'name="viewport"' in text
    assert f"{results['top1']:.2%}" in text


def test_the_animation(analyzed: Path):
    path = analyzed / "kept_patches.gif"
    assert path.stat().st_size < 3_000_000
    with Image.open(path) as animation:
        assert animation.n_frames == 19  # capacities 1.0, 0.95, ..., 0.1
        assert animation.info["loop"] == 0  # for ever
        times, pictures = [], []
        for number in range(19):
            animation.seek(number)
            times.append(animation.info["duration"])
            pictures.append(np.asarray(animation.convert("RGB")).astype(int))
    assert times == [1800, *[450] * 17, 1800]
    assert (pictures[0][0, 0] == 255).all()
    assert pictures[-1].mean() < pictures[0].mean()  # patches went dark


def test_the_same_again_does_nothing_and_another_does_not_use_it(analyzed: Path):
    loader = EvalLoader(DataConfig(eval_split="test[:90]", eval_batch_size=40))
    config = AnalysisConfig(seeds=2, permutations=2, gallery=3)

    def start(model: vm.VisionTransformer, loader: EvalLoader = loader, config: AnalysisConfig = config) -> tuple:
        analysis = Analysis(model, loader, analyzed, config)
        done = analysis.load_evaluations()
        return analysis.load_statistics().num_images, analysis.missing(done)

    assert start(make()) == (90, 0)
    # 1 + seeds * (2 alone + 1 with both); with more seeds only the new draws are missing.
    assert start(make(), config=AnalysisConfig(seeds=4, permutations=2, gallery=3)) == (90, 6)
    assert start(make(), config=AnalysisConfig(seeds=2, permutations=3, gallery=3)) == (0, 0)
    changed = make()
    with torch.no_grad():
        changed.head.bias[0] += 1
    assert start(changed) == (0, 7)
    other_routing = make()
    other_routing.set_routing(capacity_factor=0.5)
    assert start(other_routing) == (0, 7)
    for other in (DataConfig(eval_split="test[:91]", eval_batch_size=40), DataConfig(eval_split="test[:90]")):
        assert start(make(), EvalLoader(other)) == (0, 7)


@pytest.mark.parametrize("content", ["[1]", "{", '{"fingerprint": "FINGERPRINT", "evaluations": {"trained": {}}}'])
def test_damaged_evaluations_are_made_anew(tmp_path: Path, caplog: pytest.LogCaptureFixture, content: str):
    loader = EvalLoader(DataConfig(eval_split="test[:20]", eval_batch_size=20))
    analysis = Analysis(make(), loader, tmp_path, AnalysisConfig(seeds=1))
    (tmp_path / "state").mkdir()
    path = tmp_path / "state" / "random_routers.json"
    path.write_text(content.replace("FINGERPRINT", analysis.fingerprint))
    assert analysis.load_evaluations() == {}
    assert len(caplog.records) == 1
    assert "random_routers.json" in caplog.text


def test_a_few_broken_images_do_not_stop_the_pictures():
    """One of 200 images is broken, 0.5 % of all, but 20 % of the five that are spread over them."""

    class Broken(ArraySource):
        def read(self, index: int) -> np.ndarray:
            if index == 0:
                raise OSError("broken")
            return super().read(index)

    source = Broken(np.zeros((200, 28, 28), np.uint8), np.arange(200) % 10, tuple("abcdefghij"))
    images, _, _ = spread_batch(EvalLoader(DataConfig(eval_batch_size=5), source=source))
    assert len(images) == 4


def test_the_facts_tell_the_routing_that_is_in_force():
    def routing(model: vm.VisionTransformer) -> str:
        results = {"model_config": to_dict(model.config), "layers": {"1": {}, "2": {}}, "model": "m", "data": "d",
                   "num_images": 1, "split": "s", "class_names": [], "batch_size": 1, "top1": 0.5,
                   "broken_images": {}}  # fmt: skip
        return dict(_facts(results).rows)["Routing"]

    model = make()
    assert routing(model) == "top 2 of 4 experts, capacity factor 1.05, vanilla order"
    for layer, k in ((1, 1), (2, 3)):
        model.set_routing(k, 0.5, True, layers=[layer])
    text = "top 1 or 3 of 4 experts, capacity factor 0.5, batch-priority order, some blocks have their own"
    assert routing(model) == text


def test_the_words_for_expert_choice_and_normalised_weights(tmp_path: Path):
    (tmp_path / "a").mkdir()
    layers = {"1": {"combine_weights": {"mean": [0.5], "std": [0.1]}}}

    def words(**moe: object) -> str:
        results = {"model_config": to_dict(CONFIG.replace(**moe)), "layers": layers, "kept_patches": {}}
        sections = (_classes(tmp_path, results), _positions(tmp_path, results), _weights(tmp_path, results))
        return " ".join(text for section in sections for text in (*section.text, *section.how))

    assert "add up to K at every place" in words() and "divided by" not in words()
    assert "sums to K" not in words(router="expert_choice") and "up to K" not in words(router="expert_choice")
    assert "divided by the sum over the experts" in words(normalize_combine_weights=True)


def test_a_stopped_evaluation_keeps_the_finished_ones(tmp_path: Path):
    loader = EvalLoader(DataConfig(eval_split="test[:20]", eval_batch_size=20))
    analysis = Analysis(make(), loader, tmp_path, AnalysisConfig(seeds=1))
    batches: list[int] = []

    def stop(count: int) -> None:
        batches.append(count)
        if len(batches) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        analysis.run_random_routers({}, stop)
    again = Analysis(make(), loader, tmp_path, AnalysisConfig(seeds=1))
    done = again.load_evaluations()
    assert (len(done), again.missing(done)) == (2, 2)
    whole = again.run_random_routers(done, batches.append)
    fresh = Analysis(make(), loader, tmp_path / "fresh", AnalysisConfig(seeds=1)).run_random_routers({}, batches.append)
    assert whole == fresh


@pytest.mark.parametrize(
    ("overrides", "options", "message"),
    [
        ({"layers": ()}, [], "the model is dense"),
        ({"router": "soft", "num_selected_experts": 1}, [], "Soft MoE, which mixes tokens"),
        ({}, ["--seeds", "-1"], "seeds must be at least 0, got -1"),
        ({}, ["--gallery", "0"], "gallery must be at least 1, got 0"),
    ],
)
def test_mistakes(tmp_path: Path, capsys: pytest.CaptureFixture[str], overrides: dict, options: list, message: str):
    make(**overrides).save_pretrained(tmp_path / "model")
    assert main(["analyze", str(tmp_path / "model"), *IMAGES, "--out", str(tmp_path / "out"), *options]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out" / "results.json").exists()


def test_text_of_the_user_is_escaped(tmp_path: Path):
    text = page(
        "<a>", "&", Table((), [("<b>", "x")]), ["1 < 2"], [Section("<i>", ["<u>"], table=Table("h", ["<"]))], ""
    )
    assert not re.search(r"<(b|i|u)>", text)
    assert "1 &lt; 2" in text


def test_many_photographs_are_put_in_as_jpeg(tmp_path: Path):
    noise = np.random.default_rng(0).integers(0, 255, (500, 500, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "large.png")
    Image.fromarray(noise[:50, :50]).save(tmp_path / "small.png")
    pictures = [(tmp_path / "large.png", "a"), (tmp_path / "small.png", "b")]
    text = page("t", "", Table((), []), [], [Section("s", [], pictures=pictures)], "")
    assert re.findall(r'src="data:([a-z/]+);base64', text) == ["image/jpeg", "image/png"]
    assert len(text) < (tmp_path / "large.png").stat().st_size


def test_an_outlined_patch():
    crop = Crop(np.full((12, 12, 1), 100, np.uint8), (4, 8, 4, 4), 0.5, "cat")
    picture = figures.outlined(crop, 24)  # enlarged twice: rows 8 ... 15, columns 16 ... 23
    assert picture.shape == (24, 24, 3)
    orange = (picture == [255, 140, 0]).all(-1)
    assert orange.sum() == 8 * 8 - 4 * 4  # a frame of two pixels
    assert orange[8:16, 16:24].sum() == orange.sum()
    assert (picture[~orange] == 100).all()
