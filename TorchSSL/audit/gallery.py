"""A page of thumbnails and a contact sheet: pictures that a person looks through. The page needs no other file."""
from __future__ import annotations

import base64
import io
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, FileSystemLoader
from PIL import Image, ImageDraw

import shared.report
from shared.training.files import atomic, write_text

BASE = Path(shared.report.__file__).parent  # of base.html
SIDE, GAP, LINE = 96, 6, 13  # pixels: of a thumbnail, between two, and of a line of text


@dataclass(frozen=True)
class Picture:
    """A thumbnail. source: its data URI. caption: lines below it. small: show its pixels as they are."""

    source: str
    caption: tuple[str, ...]
    small: bool


@dataclass(frozen=True)
class Section:
    """Part of a page. rows: (heading or "", pictures)."""

    title: str
    rows: Sequence[tuple[str, Sequence[Picture]]]


def picture(image: Image.Image, *caption: str) -> Picture:
    """Return the thumbnail of an image (mode L or RGB)."""
    small, content = max(image.size) <= SIDE, io.BytesIO()
    if small:
        image.save(content, "PNG")
    else:
        image = image.copy()
        image.thumbnail((2 * SIDE, 2 * SIDE))
        image.save(content, "JPEG", quality=85)
    kind = "png" if small else "jpeg"
    return Picture(f"data:image/{kind};base64,{base64.b64encode(content.getvalue()).decode()}", caption, small)


def write_page(path: str | os.PathLike, title: str, introduction: Sequence[str], sections: Sequence[Section]) -> None:
    """Write the page as one HTML file."""
    pages = Environment(loader=FileSystemLoader([Path(__file__).parent, BASE]), autoescape=True)
    text = pages.get_template("gallery.html").render(title=title, introduction=introduction, sections=sections)
    write_text(path, text)


def write_contact_sheet(path: str | os.PathLike, images: Iterable[tuple[Image.Image, str]], columns: int = 10) -> None:
    """Write images (mode L or RGB) with a caption below each, row by row, as one PNG."""
    tiles = [(fitted(image), caption) for image, caption in images]
    rows, step = -(-len(tiles) // columns), SIDE + GAP
    sheet = Image.new("RGB", (min(columns, len(tiles)) * step + GAP, rows * (step + LINE) + GAP), "white")
    draw = ImageDraw.Draw(sheet)
    for number, (tile, caption) in enumerate(tiles):
        left, top = GAP + number % columns * step, GAP + number // columns * (step + LINE)
        sheet.paste(tile, (left + (SIDE - tile.width) // 2, top + (SIDE - tile.height) // 2))
        while draw.textlength(caption) > SIDE:
            caption = caption.rstrip("…")[:-1] + "…"
        draw.text((left, top + SIDE), caption, fill="black")
    with atomic(path) as file:
        sheet.save(file, "PNG")


def fitted(image: Image.Image) -> Image.Image:
    """Return an image that fits into SIDE x SIDE: photographs shrunk, small images magnified by a whole number."""
    image = image.convert("RGB")
    factor = SIDE // max(image.size)
    if factor >= 1:
        return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    image.thumbnail((SIDE, SIDE))
    return image
