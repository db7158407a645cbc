"""The demo model's parts: tokenizer, processor and a small LlavaForConditionalGeneration with random weights."""

from scenes import CLASS_NAMES, COLOR_NAMES, GRID, IMAGE_SIZE
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

PATCH = 8
PATCHES = IMAGE_SIZE // PATCH  # per side
VISUAL_TOKENS = PATCHES * PATCHES
PIXEL_MEAN, PIXEL_STD = 0.25, 0.35

SPECIAL = ["<pad>", "<bos>", "<eos>", "<unk>", "<image>"]
PROMPT_WORDS = "system user assistant : . ? you are a helpful".split()
QUESTION_WORDS = "what is at row column color the there how many list item items in plus".split()
ANSWER_WORDS = ["yes", "no", "nothing", *CLASS_NAMES, *COLOR_NAMES, *(str(n) for n in range(19))]
VOCABULARY = [*SPECIAL, *PROMPT_WORDS, *QUESTION_WORDS, *ANSWER_WORDS]
PAD, BOS, EOS = (VOCABULARY.index(token) for token in ("<pad>", "<bos>", "<eos>"))

# What every prompt starts with, up to the image, and what stands between the question and the answer.
PREFIX = "<bos> system : you are a helpful assistant . user :"
SUFFIX = "assistant :"
CHAT_TEMPLATE = (
    "<bos> system : you are a helpful assistant . "
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}user : "
    "{% if message['content'] is string %}{{ message['content'] }} "
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image> {% else %}{{ part['text'] }} {% endif %}"
    "{% endfor %}{% endif %}"
    "{% elif message['role'] == 'assistant' %}assistant : "
    "{{ message['content'] if message['content'] is string else message['content'][0]['text'] }} <eos> "
    "{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}assistant :{% endif %}"
)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A word-level tokenizer; lower-casing and splitting off punctuation forgive how a question is typed."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(VOCABULARY)}, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        extra_special_tokens={"image_token": "<image>"},
        padding_side="left",
        model_max_length=512,
    )


def build_processor() -> LlavaProcessor:
    """The processor that turns an image of 96x96 pixels and a prompt into what the model was trained on."""
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    image_processor = CLIPImageProcessor(
        do_resize=True,  # a no-op for the scenes; lets any other picture in as well
        size=size,
        do_center_crop=False,
        crop_size=size,
        image_mean=[PIXEL_MEAN] * 3,
        image_std=[PIXEL_STD] * 3,
    )
    return LlavaProcessor(
        image_processor=image_processor,
        tokenizer=build_tokenizer(),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        image_token="<image>",
        chat_template=CHAT_TEMPLATE,
        num_additional_image_tokens=1,
    )


def build_model(layers: int = 8, hidden: int = 128, vision_hidden: int = 96) -> LlavaForConditionalGeneration:
    """A small LLaVA with random weights: CLIP vision tower, two-layer projector, Llama decoder."""
    vision = CLIPVisionConfig(
        hidden_size=vision_hidden,
        intermediate_size=3 * vision_hidden,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=IMAGE_SIZE,
        patch_size=PATCH,
        projection_dim=vision_hidden,
        hidden_act="gelu",
    )
    text = LlamaConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=hidden,
        intermediate_size=hidden * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=VOCABULARY.index("<image>"),
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        image_seq_length=VISUAL_TOKENS,
        tie_word_embeddings=False,
    )
    model = LlavaForConditionalGeneration(config)
    model.generation_config.pad_token_id = PAD
    model.generation_config.bos_token_id = BOS
    model.generation_config.eos_token_id = EOS
    model.generation_config.max_new_tokens = 2 * GRID + 2  # the longest answer is a listed row and <eos>
    return model
