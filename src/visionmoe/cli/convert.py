"""`visionmoe convert`."""

from visionmoe.checkpoint.convert import ConvertConfig, run_convert
from visionmoe.cli.options import Convert
from visionmoe.cli.shared import check_kept, model_folder, output_folder


def run(options: Convert) -> None:
    if options.to != "vmoe" and options.shards != 1:
        raise ValueError(f"--shards is for --to vmoe, got {options.shards} with --to {options.to}")
    source = model_folder(options.path, or_checkpoint=True)
    check_kept(source, options.out)
    out = output_folder(options.out)
    results = run_convert(
        ConvertConfig(
            source=source,
            out=str(out),
            config=None if options.config is None else str(options.config),
            to=options.to,
            num_shards=options.shards,
            averaged=options.averaged,
        )
    )
    print(f"{results['parameters']:,} parameters in {results['seconds']:.1f} s")
    for name, size in results["files"].items():
        print(f"  {out / name}  {size:,} bytes")
