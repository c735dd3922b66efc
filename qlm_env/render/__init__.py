"""The cluster for people: as text for a terminal (``ansi``) and as a picture (``rgb_array``)."""

from qlm_env.render.picture import draw_frame
from qlm_env.render.text import draw_text

__all__ = ["draw_frame", "draw_text"]
