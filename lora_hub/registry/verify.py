"""Is this package, byte for byte, what one of these keys signed?"""

from collections.abc import Sequence

from lora_hub.manifest.document import MANIFEST_NAME
from lora_hub.package.package import Package, check_complete
from lora_hub.signing.statement import SIGNATURE_NAME
from lora_hub.signing.verify import Signer, verify


def check_signature(package: Package, public_keys: Sequence[bytes]) -> Signer:
    """Return which of the keys signed the package as its manifest describes it.

    Reads no file but the signature: compares what was signed with the manifest and the
    names of the files that are there.

    Raises:
        TrustError: no signature, another key, a bad one, or one that covers too little.
        IntegrityError: a file is missing, was added, or is not the one that was signed.
    """
    check_complete(package)
    return verify(
        package.read(SIGNATURE_NAME) if SIGNATURE_NAME in package.names else None,
        _stated(package),
        public_keys,
        where=package.where,
    )


def verify_package(package: Package, public_keys: Sequence[bytes]) -> Signer:
    """Return which of the keys signed exactly these bytes; every file is read.

    Raises:
        TrustError, IntegrityError: as `check_signature`, and a file is not as the
            manifest says.
    """
    signer = check_signature(package, public_keys)
    digests_of(package)
    return signer


def digests_of(package: Package) -> dict[str, str]:
    """Return name → digest of every file but the signature: what a signature covers.

    Raises:
        IntegrityError: a file is missing, was added, or is not as the manifest says.
    """
    check_complete(package)
    for file in package.manifest.files:
        package.read_checked(file.path)
    return _stated(package)


def _stated(package: Package) -> dict[str, str]:
    stated = {file.path: file.sha256 for file in package.manifest.files}
    return stated | {MANIFEST_NAME: package.digest}
