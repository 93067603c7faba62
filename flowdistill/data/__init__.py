"""Data sets. Only data-based objectives ever build one."""

from flowdistill.data.augmentations import RandomAffine
from flowdistill.data.datasets import Blank, Dataset, Digits, ExactSamples, ImageDataset
from flowdistill.data.image_folder import ImageFolder
from flowdistill.data.latents import Latents
from flowdistill.data.mnist import FashionMnist, IdxImages, Mnist
from flowdistill.data.torch_dataset import TorchDataset

__all__ = [
    "Blank",
    "Dataset",
    "Digits",
    "ExactSamples",
    "FashionMnist",
    "IdxImages",
    "ImageDataset",
    "ImageFolder",
    "Latents",
    "Mnist",
    "RandomAffine",
    "TorchDataset",
]
