"""Compare the pack with recorded runs of the official DynamiCrafter, Self-Forcing and LongLive.

    python tests/parity.py CASE_FOLDER...      options: --comfyui PATH

A case folder holds model.safetensors, case.json and expected.safetensors, for DynamiCrafter config.yaml too. Pictures,
prompt, start noise and step noise of the case are the inputs (causal Wan, identified by `kind` in case.json: also given
latents and embeddings); everything else is computed by the pack's own loader, conditioning and sampler and compared
with the recorded values. Prints the relative L2 error of every tensor; the last line is JSON. Exits 1 if a part is off
by more than 1e-4, or a whole run by more than 1e-3. Where DynamiCrafter's official table has another length or other
timesteps than the fixed one (uniform spacing, steps that do not divide 1000), the tables `original` are sampled.
"""
import argparse
import json
import logging
import math
import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parent
sys.path[:0] = [str(TESTS.parent / "workflows" / "runner"), str(TESTS)]

import host  # noqa: E402
import parity_causal_wan  # noqa: E402
import parity_dynamicrafter  # noqa: E402

PART, RUN = 1e-4, 1e-3


def relative_error(ours, expected) -> float:
    """||ours - expected|| / ||expected|| in float64; infinite if the shapes differ."""
    if ours.shape != expected.shape:
        return float("inf")
    ours, expected = ours.double(), expected.double()
    return ((ours - expected).norm() / expected.norm().clamp(min=1e-30)).item()


def run_case(folder: Path) -> dict[str, float]:
    """Relative error of every recorded tensor of one case."""
    case = json.loads((folder / "case.json").read_text())
    family = parity_causal_wan if "kind" in case else parity_dynamicrafter
    return {name: relative_error(*pair) for name, pair in family.run_case(folder, case).items()}


def tolerance(name: str) -> float:
    return RUN if name.endswith(("_pred_x0", "_latent", "_video", "latents")) else PART


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="+", type=Path, metavar="CASE_FOLDER")
    parser.add_argument("--comfyui", metavar="PATH", help="an existing ComfyUI folder to run in")
    options = parser.parse_args()
    for folder in options.cases:
        if not (folder / "case.json").is_file():
            parser.error(f"{folder} is no case folder: it has no case.json")
    host.check_python()
    host.reexec(options.comfyui)
    import importable  # noqa: F401
    results = {}
    for folder in options.cases:
        try:
            errors = run_case(folder)
        except Exception as error:  # still run the other cases
            logging.exception("%s", folder)
            errors = {type(error).__name__: float("inf")}
        for name, error in errors.items():
            verdict = "ok" if error <= tolerance(name) else "FAILS"
            print(f"{folder.name:16} {name:32} {error:.2e} {verdict}", flush=True)
        results[str(folder)] = errors
    failed = [f"{case}/{name}" for case, errors in results.items() for name, error in errors.items()
              if not error <= tolerance(name)]
    shown = {case: {name: error if math.isfinite(error) else None for name, error in errors.items()}
             for case, errors in results.items()}
    print(json.dumps({"passed": not failed, "failed": failed, "errors": shown}))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
