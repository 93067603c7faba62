"""Students that others have released, read from their authors' files; importing this package registers them all."""

from flowdistill.students.facm import FACMStudent
from flowdistill.students.imf import IMFStudent
from flowdistill.students.sit import FAMILIES, SiTStudent

__all__ = ["FAMILIES", "FACMStudent", "IMFStudent", "SiTStudent"]
