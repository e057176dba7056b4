"""The words of the report: what every picture shows, how to read it, and the numbers that matter, from results.json."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from visionmoe.analysis.html import Section, Table, page
from visionmoe.files import atomic_write

Results = Mapping[str, Any]


def write_report(out: Path, results: Results) -> dict[str, str]:
    """Writes report.html from the pictures in `out`; returns what each file shows, by its name."""
    sections = [section for section in _sections(out, results) if section is not None]
    text = page(
        "What the routers learned",
        "Every sparse layer of a V-MoE sends each piece of an image to a few of its experts. This report shows which "
        "experts took which pieces, what they came to know about classes and places, and what the choice is worth.",
        _facts(results),
        in_short(results),
        sections,
        f"Made by visionmoe analyze, {results['written']}. All numbers: results.json beside this file. "
        "The figures follow arXiv 2106.05974, section 5 and its appendices.",
    )
    with atomic_write(out / "report.html") as temporary:
        temporary.write_text(text, encoding="utf-8")
    pictures = {path.name: words for section in sections for path, words in section.pictures}
    return {"report.html": "everything in one page", **pictures}


def in_short(results: Results) -> list[str]:
    """The findings as sentences."""
    layers, random = results["layers"], results["random_routers"]
    lines = []
    for kind, words in (("class", "the class of the image"), ("position", "the place in the image")):
        found = {n: layer["information"][kind]["first"] for n, layer in layers.items()}
        best = max(found, key=lambda n: found[n]["excess"])
        one = found[best]
        lines.append(
            f"Block {best} knows most about {words}: the expert of a token tells {one['excess']:.2f} bits about it "
            f"beyond chance, {one['share']:.0%} of all that the expert's choice can tell ({one['expert_entropy']:.2f} "
            "bits)."
        )
    if random["seeds"]:
        trained = results["top1"]
        losses = {n: trained - entry["mean"] for n, entry in random["alone"].items()}
        most, last = max(losses, key=lambda n: losses[n]), list(random["cumulative"])[-1]
        lines.append(
            f"With experts drawn at random in block {most} alone, accuracy falls from {trained:.1%} to "
            f"{random['alone'][most]['mean']:.1%}; with all routers at random it is "
            f"{random['cumulative'][last]['mean']:.1%}."
        )
    dropped = {n: layer["load"]["dropped"] for n, layer in layers.items()}
    worst = max(dropped, key=lambda n: dropped[n])
    lines.append(
        f"At the model's own capacity at most {dropped[worst]:.1%} of the requests are dropped (block {worst})."
    )
    return lines


def _facts(results: Results) -> Table:
    moe = results["model_config"]["moe"]
    own = moe["layer_routing"] or {}
    used = [own.get(n, moe) for n in results["layers"]]  # where every block has its own, the common one is in no use
    k, capacity, order = (
        " or ".join(str(value) for value in sorted({setting[name] for setting in used}))
        for name in ("num_selected_experts", "capacity_factor", "batch_priority")
    )
    order = {"True": "batch-priority", "False": "vanilla"}.get(order, "vanilla or batch-priority")
    routers = {"top_k": f"top {k} of {moe['num_experts']} experts",
               "expert_choice": f"expert choice, {moe['num_experts']} experts"}  # fmt: skip
    routing = f"{routers[moe['router']]}, capacity factor {capacity}"
    routing += f", {order} order" if moe["router"] == "top_k" else ""
    routing += f", ensemble of {moe['ensemble_size']}" if moe["ensemble_size"] > 1 else ""
    routing += ", some blocks have their own" if moe["layer_routing"] else ""
    rows = [
        ("Model", results["model"]),
        ("Sparse layers", "blocks " + ", ".join(results["layers"]) + " (counted from 0)"),
        ("Routing", routing),
        ("Images", f"{results['num_images']:,} of {results['data']}, split {results['split']}, "
                   f"{len(results['class_names'])} classes, {results['batch_size']} per batch"),
        ("Accuracy", f"{results['top1']:.2%} top-1 as trained"),
    ]  # fmt: skip
    if results["broken_images"]:
        rows.append(("Left out", f"{len(results['broken_images'])} broken images, named in results.json"))
    return Table((), rows, facts=True)


def _sections(out: Path, results: Results) -> list[Section | None]:
    return [
        _classes(out, results),
        _information(out, results),
        _random(out, results),
        *_galleries(out, results),
        _positions(out, results),
        _capacities(out, results),
        _load(out, results),
        _weights(out, results),
        _entropy(out, results),
    ]


def _experts_choose(results: Results) -> bool:
    return bool(results["model_config"]["moe"]["router"] == "expert_choice")


def _classes(out: Path, results: Results) -> Section:
    rows = "each expert that takes it" if _experts_choose(results) else "each of its K experts"
    sums = "" if _experts_choose(results) else ", so a row sums to K (times the members of an ensemble)"
    return Section(
        "Experts and classes",
        [
            "Each row is a class, each column an expert; a bright cell means that many of the class's tokens ask for "
            "this expert. Blocks of bright cells are groups of classes that share experts; even rows mean that the "
            "router does not look at what the image shows."
        ],
        [
            f"A token counts for {rows}, whether or not it found a place{sums}. Rows and columns are ordered to bring "
            "the structure out, in every block by itself: experts in the chain whose neighbours have the most similar "
            "classes, classes by the expert that they prefer over the average class."
        ],
        [(out / "experts_by_class.png", "Heat maps of the share of each class's tokens per expert")],
    )


def _information(out: Path, results: Results) -> Section:
    rows = []
    for n, layer in results["layers"].items():
        for kind in ("class", "position"):
            first, every = layer["information"][kind]["first"], layer["information"][kind]["all"]
            chance = f"{first['shuffled_mean']:.4f} ± {first['shuffled_std']:.4f}"
            rows.append((f"block {n}, {kind}", f"{first['bits']:.4f}", chance, f"{first['excess']:.4f}",
                         f"{first['share']:.1%}", f"{every['excess']:.4f}"))  # fmt: skip
    return Section(
        "What an expert knows: mutual information",
        [
            "How much does knowing a token's expert tell about the class of its image, and about its place in the "
            "image? Zero bits: nothing; the upper bound is the entropy of the expert's choice, or of the label where "
            "that is smaller. The thin grey bars are what the same estimate gives when there is nothing to find."
        ],
        [
            "The estimate is I = H(expert) + H(label) - H(expert, label) of the counts of first choices. It is never "
            "negative, so chance alone gives it a bias that grows with the number of cells over the number of "
            "independent images. The bias is measured, not computed, for tokens of one image are not independent: for "
            "the class every image gets the label of another one by a permutation of all images, its tokens staying "
            "together; for the place the patches of every image change places at random. Mean and standard deviation "
            "over the permutations; “beyond chance” is the difference, the share is its part of the "
            "expert's entropy. “All choices” is the same difference when second and later choices count "
            "too. The class token has no place."
        ],
        [(out / "mutual_information.png", "Bars of mutual information per block beside shuffled ones")],
        Table(("", "bits", "shuffled", "beyond chance", "share of entropy", "all choices"), rows),
    )


def _random(out: Path, results: Results) -> Section | None:
    random = results["random_routers"]
    if not random["seeds"]:
        return None
    trained = results["top1"]

    def cell(entry: Mapping[str, float]) -> str:
        return f"{entry['mean']:.2%} ± {entry['std']:.2%} ({entry['mean'] - trained:+.1%})"

    kinds = ("alone", "cumulative")
    rows = [(f"block {n}", *(cell(random[kind][n]) for kind in kinds)) for n in random["alone"]]
    return Section(
        "What the choice is worth: random routers",
        [
            "The accuracy that is left when a trained router is replaced by dice. Where it hardly falls the experts "
            "are interchangeable; where it falls far the experts have become specialists who need their own tokens."
        ],
        [
            "At random means: every token's probabilities are dealt to the experts in a random order, so its K "
            "experts are drawn uniformly without replacement, while its K weights (largest first), its priority "
            f"and the capacity stay as they were. Mean and standard deviation of {random['seeds']} draws. Orange: the "
            "routers of this block and of all sparse blocks below it at once."
        ],
        [(out / "random_routers.png", "Accuracy with random routers per block, alone and cumulative")],
        Table((f"trained: {trained:.2%}", "this block alone", "this and all below"), rows),
    )


def _galleries(out: Path, results: Results) -> list[Section]:
    return [
        Section(
            f"The patches that each expert likes most: block {n}",
            [
                "Each row shows the patches (orange frame, with their surroundings) that asked for the expert with "
                "the largest probabilities of the router, at most one per image. Under each the class of its image."
            ],
            pictures=[(out / f"gallery_block{n}.png", f"Favourite patches of every expert of block {n}")],
        )
        for n in results["layers"]
    ]


def _positions(out: Path, results: Results) -> Section:
    sums = "" if _experts_choose(results) else "The maps of all experts add up to K at every place. "
    return Section(
        "Experts and places",
        [
            "One map per expert on the grid of patches: bright where many of the tokens at this place ask for the "
            "expert. An expert that lights up at the rim or in the middle has learned a place, or what usually "
            "is there, such as background."
        ],
        [f"{sums}The class token has no place and is not shown."],
        [(out / "experts_by_position.png", "Maps of the share of tokens per place and expert")],
    )


def _capacities(out: Path, results: Results) -> Section:
    orders = (
        "Batch-priority routing serves the tokens of which the router is surest first, from whatever image; vanilla "
        "routing serves them by their position in the batch, and the last images lose everything."
    )
    if _experts_choose(results):
        orders = "Every expert takes the tokens of which the router is surest, from whatever image."
    pictures = [(out / "kept_patches.gif", "Animation: photographs losing patches as capacity falls")]
    pictures += [
        (out / name, "Photographs with kept and dropped patches")
        for name in ("kept_patches.png", "kept_patches_vanilla.png")
        if name == "kept_patches.png" or len(results["kept_patches"]) > 1
    ]
    return Section(
        "Fewer places: which patches are left",
        [
            "Experts have a limited number of places per batch. As they get fewer, dark patches are processed by no "
            f"expert of the last sparse layer; only the residual connection carries them. {orders}"
        ],
        ["All images are one batch, spread over the data; the percentages are of all its patches."],
        pictures,
    )


def _load(out: Path, results: Results) -> Section:
    rows = []
    for n, layer in results["layers"].items():
        load = layer["load"]
        rows.append((f"block {n}", f"{max(load['share']):.1%}", f"{min(load['share']):.1%}", f"{load['dropped']:.2%}",
                     ", ".join(f"{share:.2%}" for share in load["dropped_by_choice"])))  # fmt: skip
    return Section(
        "Load and drops",
        ["How the requests spread over the experts. Orange is what found no place at the model's own capacity."],
        pictures=[(out / "expert_load.png", "Bars of load per expert, with what is dropped")],
        table=Table(("", "busiest expert", "idlest expert", "dropped", "dropped by choice (first, second, …)"), rows),
    )


def _weights(out: Path, results: Results) -> Section:
    rows = []
    for n, layer in results["layers"].items():
        weights = layer["combine_weights"]
        for rank, (mean, std) in enumerate(zip(weights["mean"], weights["std"], strict=True), start=1):
            rows.append((f"block {n}, choice {rank}", f"{mean:.3f}", f"{std:.3f}"))
    use = "the weight with which the expert's output enters the token's sum"
    if results["model_config"]["moe"]["normalize_combine_weights"]:
        use += ", there divided by the sum over the experts that process the token"
    return Section(
        "Combine weights",
        [
            f"The router's probability of the expert, {use}. "
            "First choices near 1 mean a router that is sure; first and second choices alike, one that hedges."
        ],
        [
            "With expert choice tokens have no first or second choice; all are in one histogram."
            if _experts_choose(results)
            else "Probabilities of the chosen experts need not add up to 1, and the second is at most 0.5."
        ],
        pictures=[(out / "combine_weights.png", "Histograms of combine weights per block and choice")],
        table=Table(("", "mean", "standard deviation"), rows),
    )


def _entropy(out: Path, results: Results) -> Section:
    found = {n: layer["entropy_bits"] for n, layer in results["layers"].items()}
    rows = [(f"block {n}", f"{e['mean']:.3f}", f"{e['std']:.3f}", f"{e['highest']:.3f}") for n, e in found.items()]
    return Section(
        "How sure the router is",
        [
            "The entropy of a token's probabilities over the experts: 0 bits when one expert has everything, the "
            "largest value when all are alike. The maps show the mean at every place, and below the share of tokens "
            "that at least one expert processed."
        ],
        pictures=[
            (out / "entropy.png", "Histograms of the router's entropy per block"),
            (out / "entropy_by_position.png", "Maps of mean entropy and of the share processed"),
        ],
        table=Table(("", "mean, bits", "standard deviation", "largest possible"), rows),
    )
