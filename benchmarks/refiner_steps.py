"""What a step of MIM-Refiner costs, relative to one of MAE-CT.

    python -m benchmarks.refiner_steps

ViT-S with 197 tokens in float32, 8 images, on the CPU: heads behind blocks 8 to 10 and on the final
feature, 2 views of 224 pixels, 10 of 96, all blocks tuned; and the same with less of it. The rows'
steps take turns; times are medians.
"""

from benchmarks.memory_and_speed import config_of, medians, prepared


def main() -> None:
    rows = {"`ct`, half of the blocks frozen": config_of("ct_vitb16", remat="none")}
    rows["`ct`, no block frozen"] = config_of("ct_vitb16", remat="none")
    rows["`ct`, no block frozen"].ct.frozen_blocks = 0
    changes = {
        "`refine`": {},
        "`refine`, one head": {"blocks": ()},
        "`refine`, no local views": {"local": {"views": 0}},
        "`refine`, both": {"blocks": (), "local": {"views": 0}},
        "`refine`, half of the blocks frozen": {"frozen_blocks": 6},
    }
    for name, change in changes.items():
        rows[name] = config_of("refine_vitl16", remat="none")
        rows[name].refine.update(change)
    rows["`refine_head`"] = config_of("refine_head_vitl16", remat="none")
    made = {name: prepared(config) for name, config in rows.items()}
    times = medians({name: steps for name, (_, *steps) in made.items()})
    first = next(iter(made))
    cost = {name: stage.flops_per_step(8) for name, (stage, *_) in made.items()}
    print("| step | FLOPs | time |\n|---|---|---|")
    for name in made:
        flops, seconds = cost[name] / cost[first], times[name] / times[first]
        print(f"| {name} | {flops:.2f} | {seconds:.2f} |")


if __name__ == "__main__":
    main()
