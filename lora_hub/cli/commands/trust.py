"""`lorahub trust`: the keys believed for namespaces."""

from pathlib import Path

import click

from lora_hub.cli import options, terminal


@click.group()
def command() -> None:
    """List, add, remove or rotate the keys believed for namespaces.

    The first contact with a namespace pins its keys; from then on a changed key stops
    everything, unless a pinned key signed the change.
    """


@command.command("list")
@options.as_json
def list_pins(as_json: bool) -> None:
    """Print every pinned namespace and its keys."""
    from lora_hub.public import trusting

    pins = trusting.pins()
    if as_json:
        terminal.out_json(pins)
        return
    terminal.table(
        [
            (pin.namespace, fingerprint, pin.registry or "added by hand", pin.pinned)
            for pin in pins
            for fingerprint in pin.fingerprints
        ]
    )
    if not pins:
        terminal.talk("no namespace is pinned yet")


@command.command()
@click.argument("namespace")
@click.argument("keys", nargs=-1, required=True, type=options.PATH, metavar="KEY.pub…")
@options.as_json
def add(namespace: str, keys: tuple[Path, ...], as_json: bool) -> None:
    """Believe these public keys for NAMESPACE, before its first package is met."""
    from lora_hub.public import trusting

    pin = trusting.believe(namespace, keys)
    if as_json:
        terminal.out_json(pin)
    else:
        terminal.out(f"{namespace} is pinned to {', '.join(pin.fingerprints)}")


@command.command()
@click.argument("namespace")
@options.as_json
def remove(namespace: str, as_json: bool) -> None:
    """Forget NAMESPACE: the next registry that is met pins it anew."""
    from lora_hub.public import trusting

    trusting.forget(namespace)
    if as_json:
        terminal.out_json({"namespace": namespace, "pinned": False})
    else:
        terminal.out(f"{namespace} is not pinned any more")


@command.command()
@click.argument("namespace")
@click.argument("keys", nargs=-1, required=True, type=options.PATH, metavar="KEY.pub…")
@click.option(
    "--key",
    type=options.PATH,
    metavar="FILE",
    help="Publish the change, signed with this private key of the namespace.",
)
@options.registry
@options.as_json
def rotate(
    namespace: str,
    keys: tuple[Path, ...],
    key: Path | None,
    registry: str | None,
    as_json: bool,
) -> None:
    """Let these public keys take the place of those believed for NAMESPACE.

    With --key the change is published: clients that pinned the old key follow by
    themselves. A key that only retires is named beside the new one, so that what it signed
    stays valid. Without --key, only this machine's pin moves.
    """
    from lora_hub.public import trusting

    if key is not None:
        trusting.rotate(namespace, keys, key, registry=registry)
        if not as_json:
            terminal.out(f"{namespace}: the registry names the new keys")
    elif registry is not None:
        raise click.UsageError("--registry publishes the change and needs --key FILE")
    pin = None
    if key is None or trusting.is_pinned(namespace):
        pin = trusting.believe(namespace, keys, replace=True)
    if as_json:
        terminal.out_json({"published": key is not None, "pin": pin})
    elif pin is not None:
        terminal.out(f"{namespace} is pinned to {', '.join(pin.fingerprints)}")
