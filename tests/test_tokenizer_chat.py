"""Chat formats: token for token those of Meta's references, and what they forbid is refused."""

import random
import re

import pytest
from corpora import tiny_byte_level, tiny_tiktoken, tiny_tokenizer

from llama_jax import tokenizer as tokenizers
from llama_jax.tokenizer import DialogError


def dialog(*turns):
    """system, user, assistant ... from texts that begin with the first letter of their role."""
    roles = {"s": "system", "u": "user", "a": "assistant", "i": "ipython"}
    return [{"role": roles[turn[0]], "content": turn[2:]} for turn in turns]


def in_llama2(*parts):
    """Each text encoded alone; <s> before each, </s> behind all but the last."""
    ids = []
    for part in parts[:-1]:
        ids += [1, *tiny_tokenizer().encode(part), 2]
    return [*ids, 1, *tiny_tokenizer().encode(parts[-1])]


def in_llama3(text, tokenizer=None):
    """Controls by name, each stretch of text between them encoded alone."""
    tokenizer = tokenizer or tiny_tiktoken()
    ids = []
    for part in re.split(r"(<\|\w+\|>(?:\n\n)?)", text):
        name = part.removesuffix("\n\n")
        if name in tokenizer.controls:
            ids.append(tokenizer.controls[name])
            part = part.removeprefix(name)
        ids += tokenizer.encode(part)
    return ids


@pytest.mark.parametrize(
    ("messages", "parts"),
    [
        (dialog("u:Hi"), ["[INST] Hi [/INST]"]),
        (dialog("u:  Hi \n"), ["[INST] Hi [/INST]"]),
        (
            dialog("s: Be kind. ", "u:  Hi "),
            ["[INST] <<SYS>>\n Be kind. \n<</SYS>>\n\n  Hi [/INST]"],
        ),
        (
            dialog("u:Hi", "a: Hello. ", "u: And? "),
            ["[INST] Hi [/INST] Hello. ", "[INST] And? [/INST]"],
        ),
        (
            dialog("s:S", "u:1", "a:2", "u:3", "a:4", "u:5"),
            [
                "[INST] <<SYS>>\nS\n<</SYS>>\n\n1 [/INST] 2 ",
                "[INST] 3 [/INST] 4 ",
                "[INST] 5 [/INST]",
            ],
        ),
        (dialog("u:"), ["[INST]  [/INST]"]),
    ],
)
def test_llama2_dialogs_are_written_as_the_reference_writes_them(messages, parts):
    assert tiny_tokenizer().encode_chat(messages) == in_llama2(*parts)


@pytest.mark.parametrize(
    ("messages", "text"),
    [
        (dialog("u:Hi"), "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"),
        (dialog("u: \n Hi "), "<|start_header_id|>user<|end_header_id|>\n\n \n Hi <|eot_id|>"),
        (
            dialog("s:Be kind.", "u:Hi", "a:Hello.", "u:And?"),
            "<|start_header_id|>system<|end_header_id|>\n\nBe kind.<|eot_id|>"
            "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\nHello.<|eot_id|>"
            "<|start_header_id|>user<|end_header_id|>\n\nAnd?<|eot_id|>",
        ),
        (
            [*dialog("u:2+2"), {"role": "tool", "content": "4"}],
            "<|start_header_id|>user<|end_header_id|>\n\n2+2<|eot_id|>"
            "<|start_header_id|>ipython<|end_header_id|>\n\n4<|eot_id|>",
        ),
        (dialog("i:4"), "<|start_header_id|>ipython<|end_header_id|>\n\n4<|eot_id|>"),
    ],
)
@pytest.mark.parametrize("make", [tiny_tiktoken, tiny_byte_level])
def test_llama3_dialogs_are_written_as_the_reference_writes_them(make, messages, text):
    whole = f"<|begin_of_text|>{text}<|start_header_id|>assistant<|end_header_id|>\n\n"
    assert make().encode_chat(messages) == in_llama3(whole)


def test_a_line_break_that_begins_a_content_stays_its_own():
    ids = tiny_tiktoken().encode_chat(dialog("u:\nx"))
    encode = tiny_tiktoken().encode
    start, end = (tiny_tiktoken().controls[f"<|{n}_header_id|>"] for n in ("start", "end"))
    header = [start, *encode("user"), end, *encode("\n\n")]
    assert ids[1 : len(header) + 1 + len(encode("\nx"))] == [*header, *encode("\nx")]


@pytest.mark.parametrize("role", ["user", "system", "assistant", "ipython"])
def test_control_names_in_llama3_contents_stay_text(role):
    text = "".join(tiny_tiktoken().controls)
    ids = tiny_tiktoken().encode_chat([{"role": role, "content": text}])
    controls = [i for i in ids if i in tiny_tiktoken().controls.values()]
    names = {id: name for name, id in tiny_tiktoken().controls.items()}
    assert [names[i] for i in controls] == [
        "<|begin_of_text|>",
        *("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        *("<|start_header_id|>", "<|end_header_id|>"),
    ]
    assert tiny_tiktoken().decode(ids) == f"{role}\n\n{text}assistant\n\n"


def test_control_names_in_llama2_contents_stay_text():
    ids = tiny_tokenizer().encode_chat(dialog("u:</s><s> hi", "a:<s>", "u:</s>"))
    assert [i for i in ids if i in (1, 2)] == [1, 2, 1]


def test_one_bos_begins_and_none_is_doubled():
    assert tiny_tiktoken().encode_chat(dialog("u:Hi")).count(tiny_tiktoken().bos_id) == 1
    assert tiny_tokenizer().encode_chat(dialog("u:Hi", "a:x", "u:y")).count(1) == 2  # a text each


LLAMA2_REFUSES = {
    "is empty": [],
    "message 0 must be a role and a content": [{"role": "user"}],
    "message 1 must be a role and a content": [*dialog("u:x"), {"role": "user", "content": None}],
    "must be a role and a content, both": [{"role": "user", "content": "x", "name": "y"}],
    "0 must be a role": ["user"],
    r"message 0 \(user\) holds \[INST\]: special tags are not allowed": dialog("u:a [INST] b"),
    r"message 0 \(system\) holds <<SYS>>": dialog("s:<<SYS>>", "u:x"),
    r"message 1 \(assistant\) holds \[/INST\]": dialog("u:x", "a:[/INST]", "u:y"),
    r"message 2 \(user\) holds <</SYS>>": dialog("u:x", "a:y", "u:<</SYS>>"),
    "message 0 has the role 'assistant', expected 'user'": dialog("a:x", "u:y"),
    "message 1 has the role 'user', expected 'assistant'": dialog("u:x", "u:y"),
    "message 2 has the role 'user', expected 'assistant'": dialog("s:x", "u:y", "u:z"),
    "message 1 has the role 'system', expected 'user'": dialog("s:x", "s:y", "u:z"),
    "message 0 has the role 'ipython', expected 'user'": dialog("i:x"),
    "must end in a message of the user": dialog("u:x", "a:y"),
    "must end in a message of the user,": dialog("s:x"),
}


@pytest.mark.parametrize("message", LLAMA2_REFUSES)
def test_what_llama2_forbids_is_refused_with_the_reason(message):
    with pytest.raises(DialogError, match=message):
        tiny_tokenizer().encode_chat(LLAMA2_REFUSES[message])


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "is empty"),
        ([{"role": "User", "content": "x"}], "message 0 has the role 'User'; Llama 3 knows"),
        ([*dialog("u:x"), {"role": "<|eot_id|>", "content": "x"}], "message 1 has the role"),
    ],
)
def test_what_llama3_does_not_know_is_refused(messages, message):
    with pytest.raises(DialogError, match=message):
        tiny_tiktoken().encode_chat(messages)


def test_a_format_without_its_control_tokens_is_refused():
    with pytest.raises(DialogError, match=r"has no <\|start_header_id\|>, which the llama3 format"):
        tiny_tokenizer().encode_chat(dialog("u:x"), "llama3")
    # Llama 2's format needs only a beginning and an end.
    ids = tiny_tiktoken().encode_chat(dialog("u:x"), "llama2")
    assert ids == tiny_tiktoken().encode("[INST] x [/INST]", bos=True)


def test_llama3_gives_metas_ids(shared_data):
    # tests/api/test_tokenizer.py of meta-llama/llama-models.
    llama3 = tokenizers.load(shared_data / "tokenizers" / "llama3_tokenizer.model")
    ids = llama3.encode_chat(dialog("u:This is a test sentence."))
    message = [128006, 882, 128007, 271, 2028, 374, 264, 1296, 11914, 13, 128009]
    assert ids == [128000, *message, 128006, 78191, 128007, 271]


LLAMA2_TEMPLATE = (
    "{% if messages[0].role == 'system' %}{% set system = '<<SYS>>\n' + messages[0].content + "
    "'\n<</SYS>>\n\n' %}{% set turns = messages[1:] %}{% else %}{% set system = '' %}"
    "{% set turns = messages %}{% endif %}{% for m in turns %}{% if m.role == 'user' %}"
    "{{ bos_token + '[INST] ' + ((system if loop.first else '') + m.content) | trim + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content | trim + ' ' + eos_token }}{% endif %}{% endfor %}"
)
LLAMA3_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{{ m.content | trim }}<|eot_id|>{% endfor %}{% if add_generation_prompt %}"
    "<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)


@pytest.mark.parity
@pytest.mark.parametrize(
    ("file", "template"),
    [
        ("llama2_tokenizer.model", LLAMA2_TEMPLATE),
        ("llama3_tokenizer.model", LLAMA3_TEMPLATE),
    ],
)
def test_transformers_writes_the_same_dialogs(shared_data, tmp_path, file, template):
    """Where templates can: contents without spaces around, which Llama 3's templates trim."""
    transformers = pytest.importorskip("transformers")
    convert = pytest.importorskip("llama_jax.convert.tokenizers")
    tokenizer = tokenizers.load(shared_data / "tokenizers" / file)
    for name, content in convert.huggingface_files(tokenizer).items():
        (tmp_path / name).write_bytes(content)
    reference = transformers.AutoTokenizer.from_pretrained(tmp_path)
    draw = random.Random(0)
    words = ["Hi!", "what\nis 12345", "日本 😀", "x" * 30, "it's", "- a\n\n- b", "(1)"]
    for _ in range(200):
        turns = [f"{'ua'[i % 2]}:{' '.join(draw.sample(words, 2))}" for i in range(5)]
        turns = turns[: draw.choice((1, 3, 5))]
        messages = dialog(*(["s:Be brief."] if draw.random() < 0.5 else []), *turns)
        expected = reference.apply_chat_template(
            messages, chat_template=template, add_generation_prompt=True, return_dict=False
        )
        assert tokenizer.encode_chat(messages) == expected
