"""PixArt-alpha and PixArt-Sigma: self-attention of the picture alone; text comes by cross attention."""

from gensparse.families.latents import picture_alone

FAMILY = picture_alone("PixArt", attention=r"transformer_blocks\.\d+\.attn1", blocks=r"transformer_blocks\.\d+")
