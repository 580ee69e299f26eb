"""A kit and the server's recipe are data: a site runs no code of theirs and gives no file away."""

from fedmerge_peft.sites.wire import Message


def test_the_servers_recipe_names_no_file_of_the_site(smoke, federation_of, tmp_path):
    secret = tmp_path / "secret.json"
    secret.write_text('{"password": "{{ 1 }}"}')
    _kit, trainers = federation_of(smoke(), 2)
    trainer = trainers["site-1"]
    text = trainer.agreed.to_yaml()
    before, _, rest = text.partition("task:\n")
    after = rest[rest.index("\nbackbone:") :]
    text = f"{before}task:\n  name: causal-lm\n  chat_template: {secret}{after}"
    fields = {"recipe": text, "dtype": trainer.federation.wire_dtype}
    reply = Message.from_bytes(trainer.handle(Message("enroll", fields).to_bytes()))
    assert reply.kind == "error"
    assert "names no file" in reply.fields["error"]
    assert "password" not in reply.fields["error"]
