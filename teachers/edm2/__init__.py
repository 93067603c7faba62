"""EDM2 (Karras et al. 2024), loaded from its authors' files."""

from flowdistill.teachers.edm2.release import read_release
from flowdistill.teachers.edm2.teacher import VARIANTS, EDM2Teacher

__all__ = ["VARIANTS", "EDM2Teacher", "read_release"]
