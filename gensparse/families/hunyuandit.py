"""HunyuanDiT and its ControlNet: self-attention of the picture alone; text comes by cross attention."""

from gensparse.families.latents import picture_alone

FAMILY = picture_alone("HunyuanDiT", attention=r"blocks\.\d+\.attn1", blocks=r"blocks\.\d+")
