#!/bin/sh
# An example of a certificate authority for one site: certificates for a broker and for devices, for mutual TLS.
#
#   pki.sh init DIR                        make the authority; its key stays in DIR/ca.key: keep it off the devices
#   pki.sh broker DIR NAME [NAME|IP ...]   make DIR/broker.crt and .key, valid for these names and addresses
#   pki.sh device DIR NAME                 make DIR/NAME.crt and .key; NAME is `device` of the agent's configuration
#
# DAYS: how long a certificate is valid (825; the authority: 3650). Nothing that exists is written over.
set -eu
umask 077
DAYS="${DAYS:-825}"

die() { echo "pki.sh: $*" >&2; exit 2; }
usage() { sed -n '2,8s/^# \{0,1\}//p' "$0" >&2; exit 2; }

named() {  # letters, digits, `_`, `-` and `.`, beginning with a letter or digit: a level of a topic and a file name
  case "$1" in
    '' | [!A-Za-z0-9]* | *[!A-Za-z0-9_.-]*) die "'$1' is no name: use letters, digits, '_', '-' and '.'" ;;
    ca | broker) [ "${2:-}" = broker ] || die "'$1' is taken: choose another name" ;;
  esac
  [ "${#1}" -le 64 ] || die "'$1' is longer than 64 characters"
}

is_address() { case "$1" in *:*) true ;; *[!0-9.]*) false ;; *) true ;; esac; }

issue() {  # DIR FILE NAME USAGE [subjectAltName]
  dir="$1" file="$2"
  [ -f "$dir/ca.key" ] || die "there is no authority in $dir: first run: pki.sh init $dir"
  [ ! -e "$dir/$file.key" ] || die "$dir/$file.key is there already: remove it first if it shall be made anew"
  work="$(mktemp -d "$dir/.new.XXXXXX")"
  trap 'rm -rf "$work"' EXIT
  openssl ecparam -name prime256v1 -genkey -noout -out "$work/key"
  openssl req -new -key "$work/key" -subj "/CN=$3" -out "$work/csr"
  {
    echo "basicConstraints=critical,CA:FALSE"
    echo "keyUsage=critical,digitalSignature"
    echo "extendedKeyUsage=$4"
    echo "subjectKeyIdentifier=hash"
    echo "authorityKeyIdentifier=keyid"
    [ -z "${5:-}" ] || echo "subjectAltName=$5"
  } > "$work/ext"
  openssl x509 -req -in "$work/csr" -CA "$dir/ca.crt" -CAkey "$dir/ca.key" -set_serial "0x$(openssl rand -hex 16)" \
    -days "$DAYS" -sha256 -extfile "$work/ext" -out "$work/crt" 2>/dev/null || die "the certificate was not signed"
  chmod 644 "$work/crt"
  mv "$work/crt" "$dir/$file.crt"
  mv "$work/key" "$dir/$file.key"
  echo "$dir/$file.crt $dir/$file.key"
}

command -v openssl >/dev/null || die "openssl is missing: apt install openssl"
[ $# -ge 2 ] || usage
verb="$1" dir="$2"
shift 2
case "$verb" in
  init)
    [ ! -e "$dir/ca.key" ] || die "$dir has an authority already"
    mkdir -p "$dir"
    openssl ecparam -name prime256v1 -genkey -noout -out "$dir/ca.key"
    openssl req -x509 -new -key "$dir/ca.key" -sha256 -days 3650 -subj "/CN=edge-adapt site authority" \
      -addext "keyUsage=critical,keyCertSign,cRLSign" -out "$dir/ca.crt"
    chmod 644 "$dir/ca.crt"
    echo "$dir/ca.crt $dir/ca.key" ;;
  broker)
    [ $# -ge 1 ] || usage
    first="$1" names=""
    for name; do
      if is_address "$name"; then entry="IP:$name"; else named "$name" broker; entry="DNS:$name"; fi
      names="${names:+$names,}$entry"
    done
    issue "$dir" broker "$first" serverAuth "$names" ;;
  device)
    [ $# -eq 1 ] || usage
    named "$1"
    issue "$dir" "$1" "$1" clientAuth ;;
  *) usage ;;
esac
