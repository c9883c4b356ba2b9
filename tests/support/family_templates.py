"""Chat templates of families in a few lines: turns, calls and reasoning stand where the real ones have them."""

from dataclasses import dataclass

from inference_service.api.chat.dialect import FORMATS
from loramux_shared.runtime import ReasoningParser, ToolParser


@dataclass(frozen=True)
class Family:
    """A template, and what is known of its models."""

    template: str
    tool: ToolParser
    reasoning: ReasoningParser = ReasoningParser.AUTO
    special: tuple[str, ...] = ()
    """Marks that are special tokens of its models."""
    end: str = "<|im_end|>"
    """End mark of a turn."""


_PUBLISHED = {
    "Qwen 2.5": Family(
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
        '{% for c in m.tool_calls or [] %}\n<tool_call>\n{"name": "{{ c.function.name }}'
        '", "arguments": {{ c.function.arguments | tojson }}}\n</tool_call>{% endfor %}<|im_end|>\n'
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
        "{% endif %}",
        ToolParser("hermes"),
    ),
    "Qwen 3": Family(
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.reasoning_content %}<think>\n"
        "{{ m.reasoning_content }}\n</think>\n\n{% endif %}{{ m.content }}"
        "{% for c in m.tool_calls or [] %}{% if not loop.first or m.content %}\n"
        '{% endif %}<tool_call>\n{"name": "{{ c.function.name }}", "arguments": '
        "{{ c.function.arguments | tojson }}}\n</tool_call>{% endfor %}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
        "{% if enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}",
        ToolParser("hermes"),
        ReasoningParser("think"),
    ),
    "Qwen 3.5": Family(
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}<think>\n"
        "{{ m.reasoning_content }}\n</think>\n\n{% endif %}{{ m.content }}"
        "{% for c in m.tool_calls or [] %}\n<tool_call>\n<function={{ c.function.name }}>\n"
        "{% for k, v in c.function.arguments | items %}<parameter={{ k }}>\n"
        "{{ v if v is string else v | tojson }}\n</parameter>\n{% endfor %}</function>\n"
        "</tool_call>{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}"
        "<|im_start|>assistant\n<think>\n{% endif %}",
        ToolParser("qwen3_coder"),
        ReasoningParser("think"),
    ),
    "Llama 3": Family(
        "{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n"
        '\n{{ m.content }}{% for c in m.tool_calls or [] %}{"name": "{{ c.function.name }}'
        '", "parameters": {{ c.function.arguments | tojson }}}{% endfor %}<|eot_id|>{% endfor %}'
        "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n"
        "\n{% endif %}",
        ToolParser("llama3_json"),
        special=("<|python_tag|>",),
        end="<|eot_id|>",
    ),
    "Llama 3.2, pythonic": Family(
        "{# [func_name1(params_name1=params_value1)] #}{% for m in messages %}<|start_header_id|>"
        "{{ m.role }}<|end_header_id|>\n\n{{ m.content }}{% if m.tool_calls %}["
        "{% for c in m.tool_calls %}{{ c.function.name }}("
        "{% for k, v in c.function.arguments | items %}{{ k }}={{ v | tojson }}"
        "{{ ', ' if not loop.last }}{% endfor %}){{ ', ' if not loop.last }}{% endfor %}]{% endif %}"
        "<|eot_id|>{% endfor %}{% if add_generation_prompt %}"
        "<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}",
        ToolParser("pythonic"),
        end="<|eot_id|>",
    ),
    "OLMo 3": Family(
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{% if m.tool_calls %}"
        "<function_calls>\n{% for c in m.tool_calls %}{{ c.function.name }}("
        "{% for k, v in c.function.arguments | items %}{{ k }}={{ v | tojson }}"
        "{{ ', ' if not loop.last }}{% endfor %})\n{% endfor %}</function_calls>{% endif %}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
        "{% endif %}",
        ToolParser("olmo3"),
    ),
    "Mistral Nemo": Family(
        "{% for m in messages %}{% if m.role == 'user' %}[INST]{{ m.content }}[/INST]{% else %}"
        "{{ m.content }}{% if m.tool_calls %}[TOOL_CALLS][{% for c in m.tool_calls %}"
        '{% if c.id | length != 9 %}{{ raise_exception(\'nine letters\') }}{% endif %}{"name": "'
        '{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}, "id": "{{ c.id }}'
        "\"}{{ ', ' if not loop.last }}{% endfor %}]{% endif %}</s>{% endif %}{% endfor %}",
        ToolParser("mistral"),
        special=("[TOOL_CALLS]",),
        end="</s>",
    ),
    "Ministral 3": Family(
        "{% for m in messages %}{% if m.role == 'user' %}[INST]{{ m.content }}[/INST]{% else %}"
        "{% if m.reasoning %}[THINK]{{ m.reasoning }}[/THINK]{% endif %}{{ m.content }}"
        "{% for c in m.tool_calls or [] %}{{ '[TOOL_CALLS]' + c.function.name + '[ARGS]' }}"
        "{{ c.function.arguments | tojson }}{% endfor %}</s>{% endif %}{% endfor %}",
        ToolParser("mistral"),
        ReasoningParser("mistral"),
        special=("[TOOL_CALLS]", "[ARGS]", "[CALL_ID]", "[THINK]", "[/THINK]"),
        end="</s>",
    ),
    "Granite 3.3": Family(
        "{# only with <|tool_call|> followed; <think></think> and <response></response> #}"
        "{% for m in messages %}<|start_of_role|>{{ m.role }}<|end_of_role|>{{ m.content }}"
        '{% if m.tool_calls %}<|tool_call|>[{% for c in m.tool_calls %}{"name": "'
        '{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}'
        "{{ ', ' if not loop.last }}{% endfor %}]{% endif %}<|end_of_text|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|start_of_role|>assistant<|end_of_role|>"
        "{% endif %}",
        ToolParser("granite"),
        ReasoningParser("granite"),
        special=("<|tool_call|>",),
        end="<|end_of_text|>",
    ),
    "Phi-4 mini": Family(
        "{% if tools %}<|tool|>{{ tools | tojson }}<|/tool|>{% endif %}{% for m in messages %}<|"
        "{{ m.role }}|>{{ m.content }}{% if m.tool_calls %}<|tool_call|>[{% for c in m.tool_calls %}{"
        '"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}'
        "{{ ', ' if not loop.last }}{% endfor %}]<|/tool_call|>{% endif %}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}",
        ToolParser("phi4"),
        special=("<|tool_call|>", "<|/tool_call|>"),
        end="<|end|>",
    ),
    "Gemma 4": Family(
        "{% macro value(v) %}{% if v is string %}<|\"|>{{ v }}<|\"|>{% elif v is mapping %}{{ '{' }}"
        "{% for k, w in v | dictsort %}{{ k }}:{{ value(w) }}{{ ',' if not loop.last }}{% endfor %}"
        "{{ '}' }}{% elif v is sequence %}[{% for w in v %}{{ value(w) }}{{ ',' if not loop.last }}"
        "{% endfor %}]{% else %}{{ v | tojson }}{% endif %}{% endmacro %}{% for m in messages %}"
        "<|turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{% if m.reasoning_content %}"
        "<|channel>thought\n{{ m.reasoning_content }}<channel|>{% endif %}{{ m.content }}"
        "{% for c in m.tool_calls or [] %}<|tool_call>call:{{ c.function.name }}"
        "{{ value(c.function.arguments) }}<tool_call|>{% endfor %}<turn|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|turn>model\n{% endif %}",
        ToolParser("gemma4"),
        ReasoningParser("gemma4"),
        special=("<|tool_call>", "<tool_call|>", '<|"|>', "<|channel>", "<channel|>"),
        end="<turn|>",
    ),
    "gpt-oss": Family(
        "{% for m in messages %}{% if m.role == 'assistant' %}{% if m.thinking %}"
        "<|start|>assistant<|channel|>analysis<|message|>{{ m.thinking }}<|end|>{% endif %}"
        "{% if m.content %}<|start|>assistant<|channel|>commentary<|message|>{{ m.content }}<|end|>"
        "{% endif %}{% if m.tool_calls %}{% set c = m.tool_calls[0] %}"
        "<|start|>assistant to=functions.{{ c.function.name }}<|channel|>commentary json<|message|>"
        "{{ c.function.arguments | tojson }}<|call|>{% endif %}{% else %}<|start|>{{ m.role }}"
        "<|message|>{{ m.content }}<|end|>{% endif %}{% endfor %}{% if add_generation_prompt %}"
        "<|start|>assistant{% endif %}",
        ToolParser("harmony"),
        ReasoningParser("harmony"),
        special=(
            "<|start|>",
            "<|channel|>",
            "<|constrain|>",
            "<|message|>",
            "<|end|>",
            "<|return|>",
            "<|call|>",
        ),
        end="<|call|>",
    ),
}
FAMILIES = {name: family for name, family in _PUBLISHED.items() if family.tool in FORMATS}
"""Published templates of families whose calls are read, by the name of the models."""
