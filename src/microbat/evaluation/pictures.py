"""Pictures that benchmarks ask about: where they are, whether they can be read, how they travel to servers and pages."""

import base64
import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

THUMBNAIL = 320  # pixels, the longer side on a page


@dataclass(frozen=True, eq=False)
class Picture:
    """An encoded picture that is read when it is needed; ``name`` is how errors call it."""

    name: str
    read: Callable[[], bytes]

    def image(self) -> Any:
        """It decoded, as RGB; ValueError, naming it, where it cannot be."""
        image = self._decoder()
        try:
            return image.convert("RGB")
        except (OSError, SyntaxError) as error:  # PIL's errors for what is truncated, or damaged
            raise ValueError(f"picture {self.name} cannot be decoded ({error})") from error

    def check(self) -> None:
        """Raise ValueError, naming it, for what is no picture, as far as shows without decoding all of it."""
        try:
            self._decoder().verify()
        except (OSError, SyntaxError) as error:
            raise ValueError(f"picture {self.name} cannot be decoded ({error})") from error

    def data_url(self) -> str:
        """As it is, for a server."""
        kind = self._decoder().get_format_mimetype()
        return f"data:{kind};base64,{base64.b64encode(self.read()).decode()}"

    def thumbnail(self) -> str:
        """A small copy as a data URL, for a page."""
        image = self.image()
        image.thumbnail((THUMBNAIL, THUMBNAIL))
        file = io.BytesIO()
        image.save(file, format="PNG", optimize=True)
        return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"

    def _decoder(self) -> Any:
        try:
            from PIL import Image, UnidentifiedImageError
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                "pictures are read by Pillow, an extra: pip install 'microbat[vision]'"
            ) from error
        try:
            return Image.open(io.BytesIO(self.read()))
        except UnidentifiedImageError as error:
            raise ValueError(f"{self.name} is not a picture in a format that Pillow reads") from error


def in_file(path: str, folder: Path) -> Picture:
    """That at ``path``, relative to ``folder``; ValueError where there is none."""
    file = folder / path
    if not file.is_file():
        raise ValueError(f"there is no picture {file}")
    return Picture(name=str(file), read=file.read_bytes)


def on_hub(rows: Any, index: int, column: str) -> Picture:
    """That of one of a data set's ``rows``, where it is not decoded: ``bytes``, and the ``path`` that it had, if any."""
    return Picture(name=f"{rows[index][column]['path'] or column}", read=lambda: rows[index][column]["bytes"])
