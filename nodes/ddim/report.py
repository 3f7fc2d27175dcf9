"""What happened during a sampling run: ranges, clipped values, NaN and Inf at each step, and a verdict."""
from dataclasses import dataclass

import torch

WIDTHS = (4, 6, 9, 9, 9, 8, 12, 9, 9, 5, 5)  # characters of the table's columns as text
COLUMNS = ("x0_min", "x0_max", "x0_mean", "x0_std", "x_min", "x_max", "x_std", "beyond", "nan", "inf")

# A good image latent ends within about +-2.5 with few values beyond +-3; a broken one reaches +-100. If the start
# image's own latent has a larger range, all limits grow with it.
USUAL = 2.5
RANGE_DOUBTFUL, RANGE_BAD = 5.0, 10.0
SHARE_DOUBTFUL, SHARE_BAD = 0.03, 0.10
FLAT_STD = 0.1


@dataclass(frozen=True)
class SamplingReport:
    """One run; each column has one value per step, in sampling order. x0 is the prediction before clipping.

    settings: one line on how it was sampled. limit: |x0| that counts as `beyond`, clipped if `clip_mode` is not off.
    values: number of latent values per step, over the whole batch. usual: the range of a good latent. origin: a
    sentence on the first layer that returned NaN or Inf, if the network was watched (`probe.watch`).
    """
    settings: str
    clip_mode: str
    limit: float
    values: int
    original: bool
    timesteps: list[int]
    columns: dict[str, list[float]]
    usual: float = USUAL
    origin: str = ""

    def verdict(self) -> tuple[str, str]:
        """("good" | "doubtful" | "bad", reason and advice)."""
        column = self.columns
        broken = [i for i in range(len(self.timesteps)) if column["nan"][i] or column["inf"][i]]
        if broken:
            return "bad", self._broken(broken[0])
        reach = max(-column["x_min"][-1], column["x_max"][-1])
        share = column["beyond"][-1] / self.values
        outside = f"{share:.1%} of the last predicted values are beyond +-{self.limit:g}"
        found = f"The final latent reaches +-{reach:.1f} (about {self.usual:.1f} is usual) and {outside}"
        advice = "Lower cfg or raise guidance_rescale" + (", or clip x0 (static, 3)" if self.clip_mode == "off" else "")
        wider = self.usual / USUAL
        if reach > RANGE_BAD * wider or share > SHARE_BAD * wider:
            return "bad", f"{found}: expect colour noise. {advice}, or check that these settings fit the model."
        if reach > RANGE_DOUBTFUL * wider or share > SHARE_DOUBTFUL * wider:
            return "doubtful", f"{found}: colours may be too strong. {advice}."
        if column["x_std"][-1] < FLAT_STD:
            return "doubtful", (f"The final latent is nearly flat (standard deviation {column['x_std'][-1]:.3f}): "
                                "expect plain grey. Use more steps, or check model and conditioning.")
        return "good", f"The final latent is within +-{reach:.1f}, {outside}, no NaN or Inf."

    def _broken(self, step: int) -> str:
        count = int(self.columns["nan"][step] + self.columns["inf"][step])
        where = f"step {step + 1} (timestep {self.timesteps[step]})"
        text = f"{count} of {self.values} values are NaN or Inf, starting at {where}. "
        if self.original:
            return text + "The original tables cause this at some step counts: choose the fixed tables."
        if self.origin:
            return text + self.origin
        return text + "The model itself returned them: load it as bf16 or fp32 instead of fp16, or check the file."

    def text(self) -> str:
        """Verdict, settings and a table with one line per step."""
        level, reason = self.verdict()
        header, rows = self.table()
        lines = ["".join(f"{text:>{WIDTHS[i]}}" for i, text in enumerate(row)) for row in (header, *rows)]
        return "\n".join([f"{level}: {reason}", self.settings, *lines])

    def table(self) -> tuple[list[str], list[list[str]]]:
        """(header, one row per step) as texts."""
        header = ["step", "t", "x0 min", "max", "mean", "std", "latent min", "max",
                  "outside" if self.clip_mode == "off" else "clipped", "NaN", "Inf"]
        rows = []
        for i, (timestep, *v) in enumerate(zip(self.timesteps, *(self.columns[name] for name in COLUMNS))):
            row = dict(zip(COLUMNS, v))
            rows.append([str(i + 1), str(timestep), f"{row['x0_min']:.2f}", f"{row['x0_max']:.2f}",
                         f"{row['x0_mean']:.3f}", f"{row['x0_std']:.3f}", f"{row['x_min']:.2f}", f"{row['x_max']:.2f}",
                         *(str(int(row[name])) for name in ("beyond", "nan", "inf"))])
        return header, rows


class Recorder:
    """Collects the columns as device tensors, so that the sampling loop does not synchronise with the device."""

    def __init__(self, settings: str, clip_mode: str, limit: float, original: bool):
        self.settings, self.clip_mode, self.limit, self.original = settings, clip_mode, limit, original
        self.values = 0
        self.timesteps: list[int] = []
        self.rows: list[torch.Tensor] = []

    def record(self, timestep: int, x0_raw: torch.Tensor, x: torch.Tensor) -> None:
        """x0_raw: prediction before clipping, x: latent after the step. Ranges ignore NaN and Inf."""
        self.values = x.numel()
        both = torch.stack([x0_raw, x])
        x0_safe, x_safe = torch.nan_to_num(both, nan=0.0, posinf=0.0, neginf=0.0)
        std_x, mean_x0, std_x0 = x_safe.std(), x0_safe.mean(), x0_safe.std()
        self.timesteps.append(timestep)
        self.rows.append(torch.stack([
            x0_safe.min(), x0_safe.max(), mean_x0, std_x0, x_safe.min(), x_safe.max(), std_x,
            (x0_safe.abs() > self.limit).sum(), both.isnan().any(0).sum(), both.isinf().any(0).sum()]))

    def finish(self, image_reach: float) -> SamplingReport:
        """The report of the recorded steps; the only place that synchronises with the device. image_reach: largest
        absolute value of the start image's latent, 0 without one."""
        table = torch.stack(self.rows).cpu().tolist()
        columns = {name: [row[i] for row in table] for i, name in enumerate(COLUMNS)}
        return SamplingReport(self.settings, self.clip_mode, self.limit, self.values, self.original, self.timesteps,
                              columns, max(USUAL, image_reach))
