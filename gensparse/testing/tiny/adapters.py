"""Image-prompt adapters with random weights for the tiny UNets."""

from typing import Any

from gensparse.testing.tiny.parts import normal

EMBEDDING = 8
"""Numbers of an image's embedding."""


def image_adapter(model: Any, *, tokens: int = 4, seed: int = 3) -> dict[str, Any]:
    """Weights of an IP-Adapter for a UNet as files have them, with `text_to_weight` as those of MIP-Adapter.

    Args:
        tokens: of an image.
    """
    draw, layers, context = normal(seed), {}, model.config.cross_attention_dim
    for number, name in enumerate(model.attn_processors):
        if not name.endswith("attn2.processor"):
            continue
        width = model.get_submodule(name.removesuffix(".processor")).to_q.out_features
        for key in ("to_k_ip", "to_v_ip"):
            layers[f"{number}.{key}.weight"] = draw(width, context) * 0.3
        layers[f"{number}.text_to_weight.weight"] = draw(1, width) * 0.3
    projection = {"proj.weight": draw(tokens * context, EMBEDDING) * 0.3, "proj.bias": draw(tokens * context) * 0.3}
    projection |= {"norm.weight": draw(context) * 0.3 + 1, "norm.bias": draw(context) * 0.3}
    return {"image_proj": projection, "ip_adapter": layers}


def load_image_adapter(model: Any, *, seed: int = 3) -> None:
    """Put such an adapter on a UNet, as diffusers' `load_ip_adapter` does."""
    model._load_ip_adapter_weights([image_adapter(model, seed=seed)], low_cpu_mem_usage=False)


def image_embeds(images: int, batch: int = 2, *, seed: int = 5) -> list[Any]:
    """What the denoiser takes as `image_embeds`: [batch, images, numbers] of one adapter."""
    return [normal(seed)(batch, images, EMBEDDING)]
