"""OpenSSF Model Signing v1 over the digests of a package: functions over bytes, no I/O.

    keys        elliptic-curve keys as PEM text
    statement   which files with which digests: the bytes that are signed
    envelope    those bytes, the signature and the key's hint in one bundle (`model.sig`)
    sign        key + digests → bundle
    policy      what a signature must cover before we call it one
    verify      bundle + digests + trusted keys → who signed

Who is trusted for which namespace is the matter of `registry/trust.py`.
Source: https://github.com/ossf/model-signing-spec, spec/v1.0.md.
"""
