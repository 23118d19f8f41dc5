#!/bin/sh
# Evidence about the container that runs this, on standard output:
#
#     evidence.sh [NONCE]      # 16 to 64 bytes in hex; without it a random one
#
# Needs curl, or an nc that speaks Unix sockets: OpenBSD's (nc -U), or a busybox that was
# built with FEATURE_UNIX_LOCAL (nc local:PATH). ACON_CLIENT=curl|nc|busybox picks one.
set -eu

socket=${ACON_CONTAINER_SOCKET:-/run/acon.sock}
nonce=${1:-$(head -c 32 /dev/urandom | od -An -v -tx1 | tr -d ' \n')}
request="{\"nonce\":\"$nonce\"}"
cr=$(printf '\r')

with_curl() {
    curl --silent --show-error --fail-with-body --max-time 90 \
        --unix-socket "$socket" --data "$request" http://supervisor/evidence
}

# A request ends with its client, and a client that ends its sending side is taken for gone.
# nc does so when its input ends: the input stays open until the whole answer is there.
with_nc() {
    answer=$(mktemp)
    trap 'rm -f "$answer" "$answer.ended"' EXIT
    {
        printf 'POST /evidence HTTP/1.0\r\nHost: supervisor\r\nContent-Length: %s\r\n\r\n%s' \
            "${#request}" "$request"
        tries=90
        until is_whole || [ -e "$answer.ended" ] || [ "$tries" -eq 0 ]; do
            sleep 1
            tries=$((tries - 1))
        done
    } | { "$@" >"$answer" || true; : >"$answer.ended"; }
    is_whole || { echo "evidence.sh: no whole answer came from: $*" >&2; return 1; }
    body
    head -n 1 "$answer" | grep -q '^HTTP/1.[01] 200 '
}

body() {
    sed "1,/^$cr\$/d" "$answer"
}

is_whole() {
    length=$(sed -n "/^$cr\$/q;s/^[Cc]ontent-[Ll]ength: *\([0-9]*\)$cr\$/\1/p" "$answer")
    [ -n "$length" ] && [ "$(body | wc -c)" -ge "$length" ]
}

client=${ACON_CLIENT:-}
if [ -z "$client" ]; then
    if command -v curl >/dev/null; then
        client=curl
    elif nc -h 2>&1 | grep -q -e '-U'; then
        client=nc
    else
        client=busybox
    fi
fi
case $client in
    curl) with_curl ;;
    nc) with_nc nc -U "$socket" ;;
    busybox) with_nc busybox nc "local:$socket" ;;
    *) echo "evidence.sh: ACON_CLIENT is curl, nc or busybox" >&2; exit 2 ;;
esac
