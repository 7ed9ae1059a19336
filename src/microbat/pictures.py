"""Pictures that a model is calibrated on or asked about: whether they can be read, how they travel to servers and pages."""

import base64
import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

THUMBNAIL = 320  # pixels, the longer side on a page


@dataclass(frozen=True, eq=False)
class Picture:
    """An encoded picture that is read when it is needed; ``name`` is how errors call it.

    ValueError, naming it, where it cannot be read; ImportError without Pillow.
    """

    name: str
    read: Callable[[], bytes]

    def image(self) -> Any:
        """It decoded, as RGB."""
        return self._decoded(lambda image: image.convert("RGB"))

    def check(self) -> None:
        """Whether it is a picture, as far as shows without decoding all of it."""
        self._decoded(lambda image: image.verify())

    def data_url(self) -> str:
        """As it is, for a server."""
        kind = self._decoded(lambda image: image.get_format_mimetype())
        return f"data:{kind};base64,{base64.b64encode(self.read()).decode()}"

    def thumbnail(self) -> str:
        """A small copy as a data URL, for a page."""
        image = self.image()
        image.thumbnail((THUMBNAIL, THUMBNAIL))
        file = io.BytesIO()
        image.save(file, format="PNG", optimize=True)
        return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"

    def _decoded(self, use: Callable[[Any], Any]) -> Any:
        opener = pillow()
        try:
            with opener.open(io.BytesIO(self.read())) as image:
                return use(image)
        except opener.UnidentifiedImageError as error:
            raise ValueError(f"{self.name}: the picture cannot be read (Pillow knows no such format)") from error
        except (OSError, SyntaxError) as error:  # missing; Pillow's errors for what is truncated, or damaged
            reason = getattr(error, "strerror", None) or error
            raise ValueError(f"{self.name}: the picture cannot be read ({reason})") from error


def pillow() -> Any:
    """Pillow's Image module; ImportError where it is missing."""
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError("pictures are read by Pillow, an extra: pip install 'microbat[vision]'") from error
    return Image
