"""Shared by the families' quality measurements: run cases on a server, read saved videos back, figures and pictures.

A family is a module `quality_<family>` with
    GRAPHS                                  names of the shipped API graphs that it runs
    BARS                                    figure -> minimum value
    make_cases(data, graphs, seed, pairs)   list of dicts with at least graph, image (number), prompt, seed
    truth(case, data)                       the true frames [T, H, W, 3] uint8
    stills(case, truth)                     pictures for the graph; one with a time axis is uploaded as an MP4
    fill(graph, case, images)               the shipped graph with the case's prompt, seed and picture names
    measure(case, frames, truth, data)      measurements of the saved video, a dict for JSON
    summary(rows)                           figures of all cases
    verdict(row)                            (text for the contact sheet, whether it is good)
"""
import io
import json
import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parent
PACK = TESTS.parent
DEMO = PACK / "nodes" / "demo"


def load_data(name: str = "shapes"):
    """The module with the drawing code and the palette ("shapes", or "scenes" for the 96x96 demo), loaded as a single
    file, so that no server is needed."""
    from importlib.util import module_from_spec, spec_from_file_location
    spec = spec_from_file_location("shapes_data", PACK / "nodes" / "training" / "data" / f"{name}.py")
    sys.modules[spec.name] = module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def load_graphs(names) -> dict[str, dict]:
    return {name: json.loads((PACK / "workflows" / "api" / f"{name}.json").read_text()) for name in names}


def only(graph: dict, class_type: str) -> dict:
    """Inputs of the graph's only node of this class."""
    found = [node["inputs"] for node in graph.values() if node["class_type"] == class_type]
    if len(found) != 1:
        raise ValueError(f"the graph has {len(found)} nodes {class_type}, not 1")
    return found[0]


def read_video(path: Path):
    """All frames of a video file, [T,H,W,3] uint8."""
    import av
    import numpy as np
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def picture_file(picture, name: str) -> tuple[bytes, str]:
    """A picture [H, W, 3] as PNG, or a clip [T, H, W, 3] as nearly lossless MP4, with the file's name."""
    import av
    from PIL import Image
    file = io.BytesIO()
    if picture.ndim == 3:
        Image.fromarray(picture).save(file, "PNG")
        return file.getvalue(), f"{name}.png"
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=8, options={"crf": "1"})
        stream.height, stream.width, stream.pix_fmt = *picture.shape[1:3], "yuv444p"
        for frame in picture:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return file.getvalue(), f"{name}.mp4"


def run_case(client, family, graph: dict, case: dict, data, folder: Path):
    """The frames decoded from the MP4 that the server saved for this case, and the true frames."""
    truth = family.truth(case, data)
    names = [client.upload(*picture_file(picture, f"{case['graph']}_{case['image']:03}_{i}"))
             for i, picture in enumerate(family.stills(case, truth))]
    outputs = client.run(family.fill(json.loads(json.dumps(graph)), case, names))
    saved, = [entry for node in outputs.values() for entry in node.get("images", [])
              if entry["filename"].endswith(".mp4")]
    client.download(saved, folder / "result.mp4")
    return read_video(folder / "result.mp4"), truth


def share(rows: list[dict], test) -> float:
    return sum(map(test, rows)) / len(rows)


def by_held_out(rows: list[dict], name: str) -> dict[str, float]:
    """The fraction of rows where `name` is true, separately for seen and held-out cases."""
    figures = {}
    for kind in ("combination", "phrasing", None):
        figure = f"{name}_held_out_{kind}" if kind else f"{name}_seen"
        figures[figure] = share([r for r in rows if r["held_out"] == kind], lambda r: r[name])
    return figures


def judge(figures: dict, bars: dict) -> dict:
    """Rounded figures, the thresholds that they miss, and whether all are met."""
    figures = {k: round(v, 3) for k, v in figures.items()}
    missed = [name for name, bar in bars.items() if figures[name] < bar]
    return figures | {"missed": missed, "passed": not missed}


def contact_sheet(shown: list[tuple], verdict, path: Path, columns: int = 8, scale: int = 2) -> None:
    """Picture of (row, frames) results: one per line, `columns` frames each, with the prompt and verdict above."""
    from PIL import Image, ImageDraw
    side, gap, text = shown[0][1].shape[1] * scale, 4, 18
    sheet = Image.new("RGB", (columns * (side + gap) + gap, len(shown) * (side + text + gap) + gap), (32, 32, 36))
    draw = ImageDraw.Draw(sheet)
    for line, (row, frames) in enumerate(shown):
        top = gap + line * (side + text + gap)
        words, good = verdict(row)
        draw.text((gap, top + 2), words, fill=(225, 225, 225) if good else (255, 110, 90), font_size=13)
        for column in range(columns):
            frame = frames[column * (len(frames) - 1) // (columns - 1)]
            picture = Image.fromarray(frame).resize((side, side), Image.Resampling.NEAREST)
            sheet.paste(picture, (gap + column * (side + gap), top + text))
    sheet.save(path)
