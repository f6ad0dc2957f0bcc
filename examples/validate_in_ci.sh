#!/usr/bin/env bash
# What a CI job runs over adapters: findings make it fail, with exit code 1.
# It needs no torch: `pip install lora-hub` is enough.
set -euo pipefail

lorahub validate registry                              # a whole registry
lorahub validate --format json registry > /dev/null    # the same, for a program
lorahub registry check registry                        # its events, blobs and signatures
