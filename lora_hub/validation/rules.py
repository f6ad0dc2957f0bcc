"""The rules of validation, each with an id that does not change.

To add one: a row here, a check in one of the files beside, a test.
"""

from dataclasses import dataclass
from typing import Literal

Severity = Literal["error", "warning", "note"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "note")  # the worst first


@dataclass(frozen=True, slots=True)
class Rule:
    """One rule.

    Attributes:
        why: what goes wrong for users where it is broken.
        mend: what its author can do.
    """

    title: str
    severity: Severity
    why: str
    mend: str


_PACK = "pack the source again with `lorahub pack`"
_SIGN = "sign the package again with `lorahub sign`"

RULES = {
    "LH001": Rule(
        "the manifest can be read",
        "error",
        "a document that two programs read differently proves nothing",
        _PACK,
    ),
    "LH002": Rule(
        "the manifest follows its schema",
        "error",
        "a missing or malformed field is one that no reader can rely on",
        _PACK,
    ),
    "LH003": Rule(
        "the manifest is canonical JSON",
        "error",
        "the package's digest is over these bytes: one content has one spelling",
        _PACK,
    ),
    "LH004": Rule(
        "the manifest has no unknown fields",
        "warning",
        "a field nobody knows is a typing error, or written for another program",
        "put fields of a tool under ext, or below a name that begins with x-",
    ),
    "LH005": Rule(
        "the manifest does not contradict itself",
        "error",
        "names, files, modules and targets are stated in several places that must agree",
        _PACK,
    ),
    "LH006": Rule(
        "the licence is an SPDX expression",
        "error",
        "without a licence that programs can read, nobody knows what they may do",
        "use an identifier of spdx.org/licenses, or LicenseRef-Name with a LICENSE file",
    ),
    "LH007": Rule(
        "the task is on the list",
        "error",
        "search and hubs know these tasks and no others",
        "the list is in lora_hub/manifest/tasks.py; further parts stand behind a slash",
    ),
    "LH008": Rule(
        "the licence is on SPDX's list",
        "warning",
        "scanners of licences know the identifiers of the list and no others",
        "look the identifier up at spdx.org/licenses, or use LicenseRef-Name with a "
        "LICENSE file",
    ),
    "LH010": Rule(
        "every file has the size and digest of the manifest",
        "error",
        "a file that differs was damaged or replaced",
        "fetch the package again, or pack the source again",
    ),
    "LH011": Rule(
        "every listed file is there",
        "error",
        "the package cannot be used or verified without it",
        "fetch the package again, or pack the source again",
    ),
    "LH012": Rule(
        "nothing lies in the package that is not listed",
        "error",
        "a file that no digest covers can be exchanged without a trace",
        "remove it, or pack it from the source",
    ),
    "LH013": Rule(
        "no file is a Git LFS pointer",
        "error",
        "a pointer names the content and is not it: nothing can be applied",
        "fetch the content with `git lfs pull`",
    ),
    "LH014": Rule(
        "texts hold nothing that steers a terminal",
        "error",
        "an escape sequence repaints a screen and a bidirectional override shows another "
        "text than the one that is there: what people read is not what programs read",
        "remove the characters that the message names",
    ),
    "LH020": Rule(
        "the weights are a strict safetensors file",
        "error",
        "readers disagree about a header that is not, and see different tensors",
        "save the adapter again; pickles and archives are never read",
    ),
    "LH021": Rule(
        "config and weights are one adapter that can be applied exactly",
        "error",
        "PEFT loads what it can and drops the rest in silence",
        "see the message",
    ),
    "LH022": Rule(
        "the manifest describes the weights",
        "error",
        "search, fit and ranks are decided by the manifest",
        _PACK,
    ),
    "LH023": Rule(
        "the adapter's folder holds no pickles",
        "warning",
        "opening a pickle runs code of its author",
        "remove them: adapter_model.safetensors is all that is needed",
    ),
    "LH024": Rule(
        "the base is named as others know it",
        "warning",
        "an adapter whose base is a path or nothing can be tried on any model, and fails",
        "pack it with --base: the package then knows its base by content",
    ),
    "LH025": Rule(
        "the base is no quantised twin",
        "warning",
        "a -bnb-4bit or -GPTQ copy holds other weights than the model it was made from, "
        "and many engines cannot load it",
        "name the model itself if that is what others shall use, and pack it with --base",
    ),
    "LH026": Rule(
        "the base is named with its owner",
        "warning",
        "a bare name is a folder on one machine and somebody's model on another",
        "write owner/name, as openai-community/gpt2; pack it with --base",
    ),
    "LH027": Rule(
        "a revision of the base is a commit",
        "warning",
        "a branch moves: the base that is found tomorrow is another one",
        "write the 40 characters of the commit, or pack it with --base",
    ),
    "LH028": Rule(
        "the header's metadata can be believed",
        "warning",
        "tools read the base, a hash or a title there and act on it",
        "save the adapter again without the metadata, or with what is true",
    ),
    "LH030": Rule(
        "all numbers are finite",
        "error",
        "one NaN or infinity in a factor makes every output NaN",
        "train again with a lower learning rate, or from an earlier checkpoint",
    ),
    "LH031": Rule(
        "the adapter does something",
        "warning",
        "with every factor b zero, the model answers as without the adapter",
        "check that training ran and that these are the trained weights",
    ),
    "LH032": Rule(
        "every target learned something",
        "note",
        "where b is zero, the target answers as without the adapter; some such are normal, "
        "in layers that no gradient reached",
        "leave these targets out of target_modules if that is always so",
    ),
    "LH033": Rule(
        "the scaling is in the usual range",
        "warning",
        "a scaling beyond 32, below 1/32 or not positive is seldom meant; alpha in place "
        "of alpha/r, or a lost alpha, give such numbers",
        "check lora_alpha, r and use_rslora against the run that trained it",
    ),
    "LH034": Rule(
        "no target moves far more than the others",
        "warning",
        "one delta out of all proportion is a run that diverged, a wrong alpha, or "
        "something that was put there on purpose",
        "look at it with `lorahub inspect`, and compare the outputs with and without it",
    ),
    "LH035": Rule(
        "the rank is used",
        "note",
        "ranks that carry nothing cost memory and time in every forward pass",
        "`lorahub compose` can write the same delta at a lower rank",
    ),
    "LH040": Rule(
        "the package is signed",
        "warning",
        "without a signature nobody can tell the author's package from another's",
        "sign it with `lorahub sign`",
    ),
    "LH041": Rule(
        "the signature is well-formed and covers the package",
        "error",
        "a signature over less than everything proves nothing about the rest",
        _SIGN,
    ),
    "LH042": Rule(
        "the signature is by a trusted key over these bytes",
        "error",
        "the package is not the one its author signed, or not by that author",
        _SIGN,
    ),
    "LH043": Rule(
        "the key of the signature is known",
        "note",
        "a signature can be compared only with a key that came from elsewhere",
        "pin the namespace's key with `lorahub trust add`",
    ),
    "LH050": Rule(
        "the registry is sound",
        "error",
        "events, keys and blobs must tell one unbroken story",
        "restore the file from where the registry came from",
    ),
    "LH060": Rule(
        "no waiver has expired",
        "warning",
        "a waiver is a promise to look again by a date, and the date has passed",
        "mend what was waived, or decide anew and give another date",
    ),
    "LH061": Rule(
        "every waiver is needed",
        "note",
        "a waiver that covers nothing will hide the next finding of its kind unseen",
        "remove it",
    ),
    "LH062": Rule(
        "every number is looked at",
        "note",
        "numbers narrower than 16 bits mean something only together with scales that lie "
        "elsewhere: whether they are finite is not known",
        "save the tensor in bfloat16, float16 or float32",
    ),
    "LH063": Rule(
        "no weight that takes the base's place is zero throughout",
        "warning",
        "a layer whose weight is zero gives the same output for every input: it was saved "
        "before it was trained, or gathered from the wrong process",
        "save the adapter again; with ZeRO or FSDP, gather the weights first",
    ),
    "LH064": Rule(
        "the weights hold what the config announces",
        "warning",
        "modules_to_save or bias name what was to be trained beside the factors, and "
        "nothing of it is in the file: it may have been lost when the adapter was saved",
        "save the adapter again with PEFT, or remove the entry",
    ),
    "LH065": Rule(
        "waivers are given by whoever checks",
        "note",
        "a file of waivers in or beside what is checked may have come with it, and would "
        "silence whatever its author likes: it waives nothing",
        "if it is yours, name it with --waivers, or run from its folder and name what is "
        "to be checked in it",
    ),
    "LH066": Rule(
        "no weight takes the base's place unannounced",
        "note",
        "PEFT saves a whole embedding or output layer along after the vocabulary was "
        "resized, and loading puts it into the base: it acts even while the adapter is off",
        "if it was not trained, save again with save_embedding_layers=False; if it was, "
        "name it in modules_to_save",
    ),
    "LH067": Rule(
        "the weights have the name that tools look for",
        "warning",
        "PEFT and the engines look for adapter_model.safetensors and for nothing else: "
        "they find no adapter here",
        "rename the file, as `lorahub validate --fix` does; `lorahub pack` takes it so",
    ),
    "LH080": Rule(
        "no link leads out of the adapter's folder",
        "error",
        "a link that came with the folder can point at any file of yours, which is then "
        "shown in a report or travels in a package",
        "put the file itself in the link's place: cp --dereference",
    ),
    "LH081": Rule(
        "no file names code that loaders are to run",
        "error",
        "transformers runs what auto_map names as soon as somebody trusts remote code; an "
        "adapter needs none",
        "remove the key, or the file if the base's own tokenizer serves",
    ),
}
