# sh view.sh BASE USER [SOURCE:PLACE]... -- COMMAND...
#
# Run COMMAND with the directory BASE as its root and each SOURCE at PLACE, in mount
# and network namespaces that are its own (with VIEW_NET=host in the machine's network).  The root is a tmpfs with the entries of
# BASE bound into it, so that PLACE need not exist in BASE and nothing is made there.
# /proc, /sys, /dev and /tmp are those of the machine; /mnt is empty.  USER is a uid, or "-".
set -eu
if [ "${VIEW_STAGE:-0}" = 0 ]; then
  net=--net
  [ "${VIEW_NET:-}" != host ] || net=
  VIEW_STAGE=1 exec unshare --mount $net --propagation private sh "$0" "$@"
fi
unset VIEW_STAGE
base=${1%/} user=$2 new=/mnt
shift 2
[ "${VIEW_NET:-}" = host ] || ip link set lo up
mount -t tmpfs -o mode=755 view "$new"
here=$PWD

spread() {  # make DIR of the new root, with a mount for each entry that BASE has in it
  for entry in "$base$1"/* "$base$1"/.[!.]*; do
    target=$new$1/${entry##*/}
    if [ "$1/${entry##*/}" = "$new" ]; then
      mkdir "$target"
    elif [ -L "$entry" ]; then
      cp -P "$entry" "$target"
    elif [ -d "$entry" ]; then
      case $1/${entry##*/} in /proc | /sys | /dev | /tmp) entry=/${entry##*/} ;; esac
      mkdir "$target"
      case " $points " in *" $1/${entry##*/}/"*) spread "$1/${entry##*/}" ;;
        *) mount --rbind "$entry" "$target" ;;
      esac
    elif [ -f "$entry" ]; then
      : > "$target"
      mount --bind "$entry" "$target"
    fi
  done
}

# The directories above each PLACE are spread, all others bound whole.
points= binds=
while [ "$1" != -- ]; do
  binds="$binds $1" place=${1##*:}
  while [ "${place%/*}" ]; do place=${place%/*} points="$points $place/ "; done
  shift
done
shift
spread ""
for bind in $binds; do
  mkdir -p "$new${bind##*:}"
  mount --rbind "${bind%%:*}" "$new${bind##*:}"
done
cd "$new"
pivot_root . .
umount -l .
cd "$here" 2>/dev/null || cd /
if [ "$user" = - ]; then exec "$@"; fi
exec setpriv --reuid "$user" --regid "$user" --clear-groups -- "$@"
