"""The typefaces of the demo's pictures: which Debian packages hold them and which families are never trained on.

Knows fonts only. Each face is cut down to the printable ASCII characters, so that the whole shelf fits in about 3 MB.
The bank calls `faces` once; drawing reads the result.
"""

import importlib
import io
import logging
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from memphi.demo.bank import Face, Split

PACKAGES: dict[str, tuple[str, ...]] = {
    "fonts-3270": ("IBM 3270",),
    "fonts-adf-accanthis": ("Accanthis ADF Std",),
    "fonts-adf-gillius": ("Gillius ADF",),
    "fonts-agave": ("Agave",),
    "fonts-anonymous-pro": ("Anonymous Pro",),
    "fonts-b612": ("B612",),
    "fonts-breip": ("Breip",),
    "fonts-cabin": ("Cabin",),
    "fonts-cabinsketch": ("Cabin Sketch",),
    "fonts-cantarell": ("Cantarell",),
    "fonts-comfortaa": ("Comfortaa",),
    "fonts-comic-neue": ("Comic Neue",),
    "fonts-courier-prime": ("Courier Prime",),
    "fonts-crosextra-caladea": ("Caladea",),
    "fonts-crosextra-carlito": ("Carlito",),
    "fonts-dancingscript": ("Dancing Script",),
    "fonts-dejavu-core": ("DejaVu Sans", "DejaVu Sans Mono", "DejaVu Serif"),
    "fonts-dkg-handwriting": ("DkgHandwriting",),
    "fonts-dosis": ("Dosis",),
    "fonts-ebgaramond": ("EB Garamond",),
    "fonts-essays1743": ("Essays1743",),
    "fonts-fantasque-sans": ("Fantasque Sans Mono",),
    "fonts-firacode": ("Fira Code",),
    "fonts-freefont-ttf": ("FreeSans", "FreeSerif", "FreeMono"),
    "fonts-gnutypewriter": ("GNUTypewriter",),
    "fonts-go": ("Go", "Go Mono"),
    "fonts-goudybookletter": ("Goudy Bookletter 1911",),
    "fonts-hack": ("Hack",),
    "fonts-hermit": ("Hermit",),
    "fonts-inconsolata": ("Inconsolata",),
    "fonts-inter": ("Inter",),
    "fonts-jetbrains-mono": ("JetBrains Mono",),
    "fonts-junction": ("Junction",),
    "fonts-jura": ("Jura",),
    "fonts-karla": ("Karla",),
    "fonts-kaushanscript": ("Kaushan Script",),
    "fonts-lato": ("Lato",),
    "fonts-league-spartan": ("League Spartan",),
    "fonts-leckerli-one": ("Leckerli One",),
    "fonts-liberation2": ("Liberation Sans", "Liberation Serif", "Liberation Mono"),
    "fonts-lindenhill": ("Linden Hill",),
    "fonts-linuxlibertine": ("Linux Libertine O", "Linux Biolinum O"),
    "fonts-lobstertwo": ("Lobster Two",),
    "fonts-monofur": ("monofur",),
    "fonts-mononoki": ("mononoki",),
    "fonts-national-park": ("National Park",),
    "fonts-ocr-a": ("OCRA",),
    "fonts-ocr-b": ("OCR B",),
    "fonts-open-sans": ("Open Sans",),
    "fonts-opendin": ("OSP-DIN",),
    "fonts-osifont": ("osifont",),
    "fonts-paratype": ("PT Sans", "PT Serif", "PT Mono"),
    "fonts-play": ("Play",),
    "fonts-prociono": ("Prociono",),
    "fonts-quattrocento": ("Quattrocento",),
    "fonts-quicksand": ("Quicksand",),
    "fonts-roadgeek": ("Roadgeek 2014 Series D",),
    "fonts-roboto-slab": ("Roboto Slab",),
    "fonts-roboto-unhinted": ("Roboto", "Roboto Condensed"),
    "fonts-routed-gothic": ("Routed Gothic",),
    "fonts-rufscript": ("Rufscript",),
    "fonts-sil-andika": ("Andika",),
    "fonts-sil-charis": ("Charis SIL",),
    "fonts-sil-gentium-basic": ("Gentium Basic",),
    "fonts-sjfonts": ("Delphine", "Steve"),
    "fonts-stix": ("STIXGeneral",),
    "fonts-tuffy": ("Tuffy",),
    "fonts-urw-base35": ("P052", "C059", "URW Bookman", "URW Gothic"),
    "fonts-vollkorn": ("Vollkorn",),
    "fonts-yrsa-rasa": ("Yrsa",),
}
HELD_OUT_FAMILIES = (
    "Breip",
    "Comfortaa",
    "Comic Neue",
    "Courier Prime",
    "Gentium Basic",
    "Hermit",
    "Jura",
    "mononoki",
    "OCR B",
    "Open Sans",
    "PT Mono",
    "PT Sans",
    "PT Serif",
    "Rufscript",
    "Vollkorn",
)
# The names that packages give to the three styles that are kept; where no style matches, a family's first face is.
STYLES = (
    ("Regular", "Book", "Roman", "Medium", "medium", "Standard", "12 Regular", "Light"),
    ("Bold", "bold", "Demi"),
    ("Italic", "Oblique", "12 Italic", "Bold Italic"),
)
CHARACTERS = "".join(map(chr, range(32, 127)))
LETTERS_AND_DIGITS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789"


def faces(folder: Path) -> Iterator[Face]:
    """Yield the wanted faces among the font files below the folder, each cut down to ASCII."""
    wanted = {family for families in PACKAGES.values() for family in families}
    found: dict[str, dict[str, Path]] = {}
    for path in sorted(_font_files(folder)):
        family, style = ImageFont.truetype(str(path), 20).getname()
        if family in wanted:
            found.setdefault(family, {}).setdefault(style or "", path)
    for family, styles in sorted(found.items()):
        split: Split = "held-out" if family in HELD_OUT_FAMILIES else "train"
        for style, path in _kept(styles):
            face = Face(family, style, split, _ascii_only(path))
            if tells_letters_apart(face.data):
                yield face


def tells_letters_apart(font: bytes) -> bool:
    """Return whether every letter and digit has a glyph of its own, and small letters are smaller than capitals."""
    face = ImageFont.truetype(io.BytesIO(font), 40)
    glyphs = {_glyph(face, character) for character in LETTERS_AND_DIGITS}
    own_glyphs = len(glyphs) == len(LETTERS_AND_DIGITS) and _glyph(face, " ") not in glyphs
    return own_glyphs and all(_height(face, letter) < 0.9 * _height(face, letter.upper()) for letter in "aeosx")


def _font_files(folder: Path) -> Iterable[Path]:
    return (path for path in folder.rglob("*") if path.suffix.lower() in (".ttf", ".otf") and path.is_file())


def _kept(styles: dict[str, Path]) -> list[tuple[str, Path]]:
    chosen = [next((name for name in names if name in styles), None) for names in STYLES]
    names = dict.fromkeys(name for name in chosen if name is not None) or dict.fromkeys([next(iter(styles))])
    return [(name, styles[name]) for name in names]


def _ascii_only(path: Path) -> bytes:
    subset: Any = importlib.import_module("fontTools.subset")
    logging.getLogger("fontTools.subset").setLevel(logging.ERROR)
    options = subset.Options(layout_features=["kern"], hinting=False, notdef_outline=True)
    font = subset.load_font(str(path), options)
    cutter = subset.Subsetter(options)
    cutter.populate(text=CHARACTERS)
    cutter.subset(font)
    out = io.BytesIO()
    subset.save_font(font, out, options)
    return out.getvalue()


def _height(face: ImageFont.FreeTypeFont, text: str) -> float:
    _, top, _, bottom = face.getbbox(text)
    return bottom - top


def _glyph(face: ImageFont.FreeTypeFont, character: str) -> bytes:
    image = Image.new("L", (80, 80))
    ImageDraw.Draw(image).text((10, 60), character, fill=255, font=face, anchor="ls")
    return image.tobytes()
