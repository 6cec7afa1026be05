"""What each family's router does, read from its source by hand: the table that the probe is tested against.

``(score, weights, selection)``: the score that weights are made of; ``always``, ``never`` or ``stated``
(by the router's ``norm_topk_prob``) renormalised, ``joint`` with shared experts, ``other``; selection ``plain``
(the largest scores) or ``other`` (a bias or groups take part).
"""

from __future__ import annotations

PLAIN_STATED = ("softmax", "stated", "plain")
PLAIN_ALWAYS = ("softmax", "always", "plain")
PLAIN_NEVER = ("softmax", "never", "plain")
DEEPSEEK_V3 = ("sigmoid", "stated", "other")
BIASED_ALWAYS = ("sigmoid", "always", "other")

CONTRACTS: dict[str, tuple[str, str, str]] = {
    "afmoe": BIASED_ALWAYS,
    "aria": PLAIN_ALWAYS,
    "axk1": DEEPSEEK_V3,
    "axk2": DEEPSEEK_V3,
    "bailing_hybrid": DEEPSEEK_V3,
    "beam": DEEPSEEK_V3,
    "cohere2_moe": PLAIN_ALWAYS,
    "dbrx": PLAIN_ALWAYS,
    "deepseek_ocr2": PLAIN_NEVER,
    "deepseek_v2": ("softmax", "never", "other"),  # built with group_limited_greedy
    "deepseek_v3": DEEPSEEK_V3,
    "deepseek_v32": DEEPSEEK_V3,
    "deepseek_v4": ("sqrtsoftplus", "always", "other"),
    "diffusion_gemma": ("probability", "always", "other"),  # "other": a factor per expert
    "dots1": DEEPSEEK_V3,
    "dots3_note": DEEPSEEK_V3,
    "ernie4_5_moe": ("softmax", "always", "other"),
    "ernie4_5_vl_moe": ("softmax", "always", "other"),
    "exaone_moe": DEEPSEEK_V3,
    "flex_olmo": PLAIN_STATED,
    "flint": ("sigmoid", "stated", "plain"),
    "gemma4": ("probability", "always", "other"),
    "glm4_moe": DEEPSEEK_V3,
    "glm4_moe_lite": DEEPSEEK_V3,
    "glm4v_moe": DEEPSEEK_V3,
    "glm5_next": DEEPSEEK_V3,
    "glm_moe_dsa": DEEPSEEK_V3,
    "gpt_oss": PLAIN_ALWAYS,
    "granitemoe": PLAIN_ALWAYS,
    "granitemoe_swa": PLAIN_ALWAYS,
    "granitemoehybrid": PLAIN_ALWAYS,
    "granitemoeshared": PLAIN_ALWAYS,
    "hunyuan_v1_moe": PLAIN_ALWAYS,
    "hy_v3": BIASED_ALWAYS,
    "hy_v4": DEEPSEEK_V3,
    "hy_v4_vl": DEEPSEEK_V3,
    "inkling": ("sigmoid", "joint", "other"),
    "inkling2": BIASED_ALWAYS,
    "inkling2_loop": BIASED_ALWAYS,
    "jamba": PLAIN_NEVER,
    "kimi_linear": DEEPSEEK_V3,
    "kolibri1": DEEPSEEK_V3,
    "laguna": BIASED_ALWAYS,
    "lara_mini": PLAIN_STATED,
    "lfm2_moe": DEEPSEEK_V3,
    "longcat_flash": ("softmax", "never", "other"),
    "mellum": PLAIN_STATED,
    "mimo_v2_flash": DEEPSEEK_V3,
    "minimax": PLAIN_ALWAYS,
    "minimax_m2": BIASED_ALWAYS,
    "minimax_m3_vl": BIASED_ALWAYS,
    "mistral4": ("softmax", "stated", "other"),
    "mistral_large4": ("softmax", "always", "other"),
    "mixtral": PLAIN_ALWAYS,
    "muse_spark": BIASED_ALWAYS,
    "nemotron_h": DEEPSEEK_V3,
    "olmoe": PLAIN_STATED,
    "openai_privacy_filter": PLAIN_ALWAYS,
    "phimoe": ("softmax", "other", "other"),  # sparsemixer: a masked softmax per slot
    "qwen2_moe": PLAIN_STATED,
    "qwen3_5_moe": PLAIN_ALWAYS,
    "qwen3_moe": PLAIN_STATED,
    "qwen3_next": PLAIN_STATED,
    "qwen3_omni_moe": PLAIN_STATED,
    "qwen3_vl_moe": PLAIN_ALWAYS,
    "qwen4_exp": PLAIN_STATED,
    "solar_open": DEEPSEEK_V3,
    "step3p7": BIASED_ALWAYS,
    "unlimited_ocr": PLAIN_NEVER,
    "zaya": ("softmax", "never", "other"),
}

REFUSED = ("doge", "jetmoe", "llama4", "nllb_moe", "switch_transformers")

# Families whose experts route by themselves in transformers older than the version named: refused there.
ROUTES_INSIDE_BEFORE = {"aria": (5, 23)}

# At least one family of every kind of contract; these run in every test run, the others in `make conformance`.
SAMPLE = (
    "afmoe",  # the bias is an argument of the router
    "dbrx",  # a routing method of the block
    "deepseek_v2",  # groups, raw weights with a factor
    "deepseek_v3",  # bias, groups, renormalised with a factor
    "ernie4_5_vl_moe",  # two routers per layer
    "gemma4",  # probabilities for logits, a factor per expert
    "gpt_oss",  # softmax over the top-k, experts with bias
    "inkling",  # joint normalisation, an extra output
    "longcat_flash",  # identity experts
    "mixtral",
    "nemotron_h",  # experts without a gate, hybrid stack
    "olmoe",
    "phimoe",  # sparsemixer
    "qwen3_vl_moe",  # composite
    "zaya",  # one expert, recurrent router, wider logits
)
