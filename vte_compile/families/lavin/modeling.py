"""LaVIN's models, of transformers' parts: CLIP's image encoder with adapters, an MLP, LLaMA.

    x_0 = LN_pre(CLIP's embeddings) ;  h = x + Attention(AD(LN_1 x)) ;  out = h + MLP(LN_2 h)      in each layer of CLIP
    visual tokens = B silu(A c + bA) + bB,   c: the class token behind layers 4, 8 ... 24

Source: "Cheap and Quick: Efficient Vision-Language Instruction Tuning for Large Language Models", arXiv 2305.15023.
LLaMA's own adapters are no part of the model but of a plan (vte_compile/families/lavin/checkpoint.py).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModel, LlavaForConditionalGeneration
from transformers.models.clip.modeling_clip import CLIPEncoderLayer, CLIPPreTrainedModel, CLIPVisionEmbeddings
from transformers.models.llava.modeling_llava import LlavaModel

from vte_compile.families.lavin.configuration import LavinConfig
from vte_compile.families.placeholder_model import PlaceholderModel


class LavinVisionAdapter(nn.Module):
    """The mixture-of-modality adapter in front of an attention of CLIP; parameters as the authors name them."""

    def __init__(self, config: LavinConfig) -> None:
        super().__init__()
        size, width, groups = config.vision_config.hidden_size, config.adapter_width, config.adapter_groups
        self.conv_A = nn.Conv1d(size, width, 1)
        self.conv_B = nn.Conv1d(width, size, 1, groups=groups)
        self.conv_D = nn.Conv1d(width, size, 1, groups=groups)
        self.expert_weights = nn.Linear(size, 2)
        self._scale, self._temperature = config.adapter_scale, config.adapter_temperature
        self._each_token = config.adapter_routing == "token"

    def forward(self, x: Tensor) -> Tensor:
        """AD(x) [images, 1 + patches, C]."""
        read = x if self._each_token else x[:, 1:].mean(dim=1, keepdim=True)
        w = torch.softmax(self.expert_weights(read) / self._temperature, -1)
        z = self.conv_A(x.transpose(1, 2))
        experts = [conv(z).transpose(1, 2) for conv in (self.conv_B, self.conv_D)]
        adapted: Tensor = x + self._scale * (w[..., :1] * experts[0] + w[..., 1:] * experts[1])
        return adapted


class LavinVisionLayer(CLIPEncoderLayer):
    """A layer of CLIP with an adapter, if the model has them."""

    def __init__(self, config: LavinConfig) -> None:
        super().__init__(config.vision_config)
        self.adapter_attn: nn.Module = LavinVisionAdapter(config) if config.adapter_width else nn.Identity()

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """[images, 1 + patches, C] -> the same."""
        normed = self.adapter_attn(self.layer_norm1(hidden_states))
        attended = hidden_states + self.self_attn(hidden_states=normed, attention_mask=None)[0]
        output: Tensor = attended + self.mlp(self.layer_norm2(attended))
        return output


class LavinVisionModel(CLIPPreTrainedModel):
    """CLIP's image encoder with LaVIN's adapters, up to the last layer whose class token is used."""

    def __init__(self, config: LavinConfig) -> None:
        super().__init__(config.vision_config)
        self._feature_layers = frozenset(config.feature_layers)
        self.embeddings = CLIPVisionEmbeddings(config.vision_config)
        self.pre_layrnorm = nn.LayerNorm(config.vision_config.hidden_size, eps=config.vision_config.layer_norm_eps)
        self.layers = nn.ModuleList([LavinVisionLayer(config) for _ in range(max(config.feature_layers))])
        self.post_init()

    def forward(self, pixel_values: Tensor) -> Tensor:
        """[images, 3, height, width] -> class tokens [images, feature layers, C]."""
        hidden = self.pre_layrnorm(self.embeddings(pixel_values))
        features = []
        for number, layer in enumerate(self.layers, start=1):
            hidden = layer(hidden)
            if number in self._feature_layers:
                features.append(hidden[:, 0])
        return torch.stack(features, dim=1)


class LavinProjector(nn.Module):
    """The MLP that makes class tokens of CLIP visual tokens."""

    def __init__(self, config: LavinConfig) -> None:
        super().__init__()
        self.conv_A = nn.Linear(config.vision_config.hidden_size, config.projector_width)
        self.conv_B = nn.Linear(config.projector_width, config.text_config.hidden_size)

    def forward(self, features: Tensor) -> Tensor:
        """[..., C of CLIP] -> [..., C of LLaMA]."""
        projected: Tensor = self.conv_B(F.silu(self.conv_A(features)))
        return projected


class LavinModel(PlaceholderModel):
    """LaVIN without the language-modelling head."""

    config: LavinConfig  # type: ignore[assignment]  # not a LlavaConfig

    def __init__(self, config: LavinConfig) -> None:
        super(LlavaModel, self).__init__(config)  # its parts are others
        self.vision_tower = LavinVisionModel(config)
        self.multi_modal_projector: Any = LavinProjector(config)
        self.language_model = AutoModel.from_config(config.text_config)
        self.post_init()

    def image_features(self, pixel_values: Tensor) -> Tensor:
        """[images, 3, height, width] -> [images, 6, C]."""
        tower = self.vision_tower
        projected: Tensor = self.multi_modal_projector(tower(pixel_values.to(tower.device, tower.dtype)))
        return projected


class LavinForConditionalGeneration(LlavaForConditionalGeneration):
    """LaVIN (luogen1996/LaVIN) and LaVIN-EAS (DoubtedSteam/EAS), without the adapters of LLaMA, which a plan holds.

    What goes in and out is as in transformers' LlavaForConditionalGeneration: ``input_ids`` [B, T], with one
    ``config.image_token_id`` per visual token (six an image), and ``pixel_values`` [images of all rows, 3, 224, 224].
    Load it with :func:`vte_compile.families.lavin.load_lavin`; ``save_pretrained`` and ``from_pretrained`` work.
    """

    config_class = LavinConfig
    config: LavinConfig  # type: ignore[assignment]  # not a LlavaConfig

    def __init__(self, config: LavinConfig) -> None:
        super(LlavaForConditionalGeneration, self).__init__(config)
        self.model = LavinModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()
