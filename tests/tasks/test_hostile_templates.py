"""A chat template from somebody else runs in Jinja's sandbox: it reads no file and runs no code."""

import pytest
from datasets import Dataset

from fedmerge_peft.errors import DataError

CHATS = Dataset.from_dict(
    {"messages": [[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]]}
)
REACHING = [
    "{{ cycler.__init__.__globals__.os.system('touch MARK') }}",
    "{{ raise_exception.__globals__['__builtins__']['open']('MARK', 'w') }}",
    "{{ strftime_now.__globals__ }}",
    "{{ (messages | attr('__class__')).__mro__ }}",
    "{{ '{0.__class__.__mro__}'.format(messages) }}",
    "{{ ('{0.__class__.__mro__}' | attr('format'))(messages) }}",
    "{% set f = '{0.__class__.__mro__}'.format %}{{ f(messages) }}",
    "{{ lipsum.__globals__['os'].popen('touch MARK').read() }}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}{{ os }}",
    "{{ messages.append(1) }}",
    "{% for a in range(1000000) %}a{% endfor %}",
]


@pytest.mark.parametrize("template", REACHING)
def test_a_template_reaches_nothing_but_the_messages(task_of, tmp_path, template):
    mark = tmp_path / "ran"
    template = template.replace("MARK", str(mark))
    with pytest.raises(DataError, match="chat template") as refused:
        task_of("llama", CHATS, name="causal-lm", chat_template=template).encode(CHATS)
    assert not mark.exists()
    for secret in ("root:", "class 'object'", "builtins"):
        assert secret not in str(refused.value).replace(template, "")
