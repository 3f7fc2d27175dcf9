"""What came of a batch: a table of its jobs, and a contact sheet of its results."""

import csv
import io
import math

from inprocess import common

COLUMNS = ["name", "state", "files", "server", "attempts", "seconds", "memory_mb", "error", "id"]
ROWS, COLUMNS_OF_SHEET, EDGE, GAP, LINE = 8, 4, 96, 6, 16  # results on a page, pixels
SHOWN = 3  # frames of each result: first, middle, last


def write_summary(jobs):
    """Write summary.csv of all jobs, in their order; returns its path."""
    path = jobs.folder / "summary.csv"
    with common("saving").replacing(path) as content, open(content, "x", encoding="utf-8", newline="") as file:
        table = csv.writer(file)
        table.writerow(COLUMNS)
        for row in jobs.rows("waiting", "running", "done", "failed"):
            files = " ".join(made.path for made in jobs.files(row["id"])) if row["state"] == "done" else ""
            seconds = "" if row["seconds"] is None else round(row["seconds"], 2)
            memory = "" if row["memory"] is None else round(row["memory"] / 1e6)
            table.writerow([row["name"], row["state"], files, row["server"], row["attempts"], seconds, memory,
                            row["error"], row["id"]])
    return path


def write_sheets(jobs):
    """Write sheet_001.png, ... with frames of every result; returns the paths. Results that cannot be read are named
    on the sheet. Raises ImportError without PyAV, which ComfyUI's Python has."""
    page, paths, page_size = [], [], ROWS * COLUMNS_OF_SHEET
    for old in jobs.folder.glob("sheet_*.png"):
        old.unlink()

    def flush():
        path = jobs.folder / f"sheet_{len(paths) + 1:03}.png"
        data = io.BytesIO()
        draw(page).save(data, "PNG")
        common("saving").write_file(path, data.getvalue())
        paths.append(path)
        page.clear()

    for row in jobs.rows("done"):
        first = jobs.files(row["id"])[0]
        page.append((row["name"], frames_of(jobs.output / first.path)))
        if len(page) == page_size:
            flush()
    if page:
        flush()
    return paths


def frames_of(path):
    """First, middle and last picture of a video or picture, as PIL images no larger than EDGE; [] if unreadable."""
    import av

    try:
        with av.open(str(path)) as container:
            count = container.streams.video[0].frames or 1  # an image has no count
            wanted = [i * (count - 1) // (SHOWN - 1) for i in range(SHOWN)] if count > 1 else [0]
            found = {i: small(frame.to_image()) for i, frame in enumerate(container.decode(video=0)) if i in wanted}
            return [found[i] for i in wanted if i in found]
    except (av.error.FFmpegError, IndexError, OSError):
        return []


def small(image):
    image.thumbnail((EDGE, EDGE))
    return image


def draw(page):
    from PIL import Image, ImageDraw, ImageFont

    width = SHOWN * EDGE + GAP
    columns = min(COLUMNS_OF_SHEET, len(page))
    rows = math.ceil(len(page) / columns)
    sheet = Image.new("RGB", (columns * (width + GAP) + GAP, rows * (EDGE + LINE + GAP) + GAP), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    for i, (name, frames) in enumerate(page):
        x, y = GAP + i % columns * (width + GAP), GAP + i // columns * (EDGE + LINE + GAP)
        pen.text((x, y), name[:44] + ("" if frames else "  (cannot be shown)"), "black", font)
        for j, frame in enumerate(frames):
            sheet.paste(frame, (x + j * EDGE, y + LINE))
    return sheet
