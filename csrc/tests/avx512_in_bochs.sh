#!/usr/bin/env bash
# Runs `kernel_check --isa avx512` on a machine without AVX-512: a Linux kernel and kernel_check as its only program, booted in
# the Bochs emulator as a Skylake-X. About 1 minute to boot, then about 50 million instructions a second.
#
#   csrc/tests/avx512_in_bochs.sh [CASES]        default 120: number 96 is the first with a large image
#
# Debian and Ubuntu packages: g++ bochs isolinux syslinux-common xorriso cpio, and a kernel in /boot or unpacked anywhere:
#   apt-get download linux-image-<version>-cloud-amd64 && dpkg -x linux-image-*.deb DIR && KERNEL=DIR/boot/vmlinuz-* ...
# Exit status: kernel_check's; 77 when a tool or a kernel is missing; 124 after 10 minutes.
set -euo pipefail

cases=${1:-120}
csrc=$(cd "$(dirname "$0")/.." && pwd)

missing() {
  echo "avx512_in_bochs: skipped, $1 is missing (the packages are named in the script)" >&2
  exit 77
}
for tool in "${CXX:-g++}" bochs xorriso cpio; do
  command -v "$tool" >/dev/null || missing "$tool"
done
for file in /usr/lib/ISOLINUX/isolinux.bin /usr/lib/syslinux/modules/bios/ldlinux.c32 /usr/share/bochs/BIOS-bochs-latest; do
  [ -e "$file" ] || missing "$file"
done
kernel=${KERNEL:-$(ls /boot/vmlinuz-*cloud* /boot/vmlinuz-* 2>/dev/null | head -n 1 || true)}
[ -r "$kernel" ] || missing "a readable Linux kernel in /boot"

scratch=$(mktemp -d)
emulator=
cleanup() {
  [ -z "$emulator" ] || kill "$emulator" 2>/dev/null || true
  rm -rf "$scratch"
}
trap cleanup EXIT
mkdir "$scratch/root" "$scratch/iso"

# The first process: opens the serial console, runs kernel_check with the arguments of the kernel's command line.
cat >"$scratch/init.c" <<'EOF'
#include <fcntl.h>
#include <stdio.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <termios.h>
#include <unistd.h>

int main(int argc, char** argv) {
  (void)argc;
  mkdir("/dev", 0755);
  mount("devtmpfs", "/dev", "devtmpfs", 0, 0);
  int console = open("/dev/ttyS0", O_RDWR);
  for (int fd = 0; fd < 3; ++fd) dup2(console, fd);
  int status = 0;
  if (fork() == 0) {
    execv("/kernel_check", argv);
    _exit(127);
  }
  wait(&status);
  printf("\nkernel_check status %d\n", WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status));
  fflush(stdout);
  tcdrain(1);
  for (;;) pause();
}
EOF
cxx=("${CXX:-g++}")
"${cxx[@]}" -x c -O1 -static "$scratch/init.c" -o "$scratch/root/init"

# The flags of setup.py, so that the code under test is the code that ships.
flags=(-std=c++17 -O3 -fopenmp -fvisibility=hidden -fno-exceptions -fno-rtti -ffp-contract=off "-I$csrc")
own_scalar=()
own_avx2=(-mavx2 -mfma)
own_avx512=(-mavx512f -mavx512vl -mavx512dq -mavx512bw -mfma -Wno-maybe-uninitialized)
own_avx512bf16=("${own_avx512[@]}" -mavx512bf16)
# The steps of all instruction sets call pairs_scalar.cpp; the emulated CPU has no AVX512_BF16.
for source in conv2d_scalar conv2d_avx2 conv2d_avx512 pairs_scalar pairs_avx512bf16; do
  declare -n own="own_${source#*_}"
  "${cxx[@]}" "${flags[@]}" "${own[@]}" -c "$csrc/cpu/$source.cpp" -o "$scratch/$source.o"
done
"${cxx[@]}" -std=c++17 -O2 -fopenmp "-I$csrc" -static "$csrc/tests/kernel_check.cpp" "$scratch"/*.o \
  -o "$scratch/root/kernel_check" 2>"$scratch/link.log" || { cat "$scratch/link.log" >&2; exit 1; }

(cd "$scratch/root" && find . | cpio -o -H newc --quiet) >"$scratch/iso/initrd.img"
cp "$kernel" "$scratch/iso/vmlinuz"
cp /usr/lib/ISOLINUX/isolinux.bin /usr/lib/syslinux/modules/bios/ldlinux.c32 "$scratch/iso/"
# clearcpuid: Bochs 2.7 states the uncompacted size for XSAVEC, for which Linux would turn all of AVX off.
cat >"$scratch/iso/isolinux.cfg" <<EOF
default check
prompt 0
label check
  kernel vmlinuz
  append initrd=initrd.img console=ttyS0,115200 quiet mitigations=off nokaslr nosmp noapic acpi=off tsc=reliable lpj=1000000 clearcpuid=xsavec,xsaves rdinit=/init -- --isa avx512 --cases $cases --max-threads 1
EOF
xorriso -as mkisofs -quiet -o "$scratch/check.iso" -b isolinux.bin -c boot.cat -no-emul-boot -boot-load-size 4 \
  -boot-info-table "$scratch/iso" 2>/dev/null
# rfb is the display that needs neither a screen nor a terminal; without a sound card Bochs aborts unless sound is a dummy.
cat >"$scratch/bochsrc" <<EOF
cpu: model=corei7_skylake_x, count=1, ips=50000000, reset_on_triple_fault=0
memory: guest=256, host=256
romimage: file=/usr/share/bochs/BIOS-bochs-latest
vgaromimage: file=/usr/share/bochs/VGABIOS-lgpl-latest
ata0-master: type=cdrom, path=$scratch/check.iso, status=inserted
boot: cdrom
com1: enabled=1, mode=file, dev=$scratch/serial.txt
display_library: rfb, options="timeout=0"
sound: waveoutdrv=dummy, waveindrv=dummy, midioutdrv=dummy
speaker: enabled=0
log: $scratch/bochs.log
panic: action=fatal
error: action=ignore
info: action=ignore
clock: sync=none
EOF
echo c >"$scratch/continue" # the debugger of Debian's build waits for it
bochs -q -f "$scratch/bochsrc" -rc "$scratch/continue" </dev/null >"$scratch/bochs.out" 2>&1 &
emulator=$!

for ((second = 0; second < 600; ++second)); do
  if grep -q '^kernel_check status' "$scratch/serial.txt" 2>/dev/null; then
    tr -d '\r' <"$scratch/serial.txt" | grep -vE '^$|^\[' | tail -n 40
    echo "avx512_in_bochs: $second s"
    exit "$(tr -d '\r' <"$scratch/serial.txt" | sed -n 's/^kernel_check status //p')"
  fi
  kill -0 "$emulator" 2>/dev/null || { tail -n 5 "$scratch/bochs.out" "$scratch/bochs.log" >&2; exit 1; }
  sleep 1
done
tail -n 20 "$scratch/serial.txt" >&2
exit 124
