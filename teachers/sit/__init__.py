"""SiT (Ma et al. 2024) and SiT with REPA (Yu et al. 2024), loaded from their authors' files."""

from flowdistill.teachers.sit.teacher import VARIANTS, SiTTeacher

__all__ = ["VARIANTS", "SiTTeacher"]
