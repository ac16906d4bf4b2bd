# shellcheck shell=bash
# The micro-VM's kernel: a distribution's own package, unpacked into the cache, never installed. Sourced by softroce.
#
# prepare_kernel leaves in $cache/kernel
#   release         the kernel's release, e.g. 6.12.1-amd64
#   image           what QEMU boots: vmlinux where that can be had, else vmlinuz
#   lib/modules/    all modules, so that the guest can modprobe more of them
#   initrd          busybox and the modules needed to reach the root and to have soft-RoCE

kernel=$cache/kernel
# In the guest's order of need; modprobe adds what they depend on. Without crc32_generic rdma_rxe finds no CRC and refuses.
kernel_modules=(virtio_pci virtio_console 9p 9pnet_virtio overlay ib_uverbs crc32_generic rdma_rxe dummy nvme)

prepare_kernel() {
    mkdir -p "$cache"
    exec 8> "$cache/kernel.lock"
    flock 8
    [ -s "$kernel/image" ] || fetch_kernel
    local want
    want=$(printf '%s\n' "$(cat "$kernel/release")" "${kernel_modules[@]}" "$(declare -f make_initrd)" | sha256sum)
    if [ ! -s "$kernel/initrd" ] || [ "$(cat "$kernel/initrd.stamp" 2>/dev/null)" != "$want" ]; then
        make_initrd
        echo "$want" > "$kernel/initrd.stamp"
    fi
    exec 8>&-
}

# find_kernel: print the packages that hold a kernel with rdma_rxe. Never a cloud flavour: those leave rdma_rxe out.
find_kernel() {
    local meta package
    if [ "$(distribution)" = ubuntu ]; then # not shown to work yet
        package=$(depended linux-image-generic 'linux-image-[0-9].*-generic')
        [ -n "$package" ] || return 1
        echo "$package"
        for meta in modules modules-extra; do
            ! apt_knows "linux-$meta-${package#linux-image-}" || echo "linux-$meta-${package#linux-image-}"
        done
        return
    fi
    package=$(depended linux-image-6.12-amd64 'linux-image-[0-9].*-amd64')
    [ -n "$package" ] || package=$(apt-cache pkgnames linux-image- | grep -vE 'cloud|-rt-|unsigned|dbg' |
        grep -E '^linux-image-[0-9.]+([+-].*)?-amd64$' |
        while read -r p; do ! apt_knows "$p" || echo "$p"; done | sort -V | tail -n 1)
    [ -n "$package" ] || package=$(depended linux-image-amd64 'linux-image-[0-9].*-amd64')
    [ -z "$package" ] || echo "$package"
}

# depended META PATTERN: print the package that META depends on.
depended() { apt-cache depends "$1" 2>/dev/null | awk -v p="^$2\$" '$1 == "Depends:" && $2 ~ p { print $2; exit }'; }

fetch_kernel() {
    local packages package work image
    [ "$(uname -m)" = x86_64 ] || die "no micro-VM on $(uname -m): this is written for x86-64 only. Load rdma_rxe on the host instead"
    apt_refresh
    packages=$(find_kernel || :)
    [ -n "$packages" ] || die "apt knows no kernel package to boot in a micro-VM"
    say "fetching the micro-VM's kernel, once: ${packages//$'\n'/ }"
    work=$(mktemp -d "$cache/kernel.XXXXXX")
    # shellcheck disable=SC2086
    (cd "$work" && apt-get -o APT::Sandbox::User=root -qq download $packages) >&2 ||
        { rm -rf "$work"; die "the kernel package could not be fetched"; }
    for package in "$work"/*.deb; do
        # Newer packages put everything under ./usr.
        dpkg-deb --fsys-tarfile "$package" |
            tar -x -C "$work" --wildcards --transform 's,^\./usr/,./,' --no-same-owner './boot/vmlinuz*' '*lib/modules/*' 2>/dev/null || :
        rm "$package"
    done
    image=$(find "$work/boot" -name 'vmlinuz-*' | head -n 1)
    [ -n "$image" ] || { rm -rf "$work"; die "no vmlinuz in ${packages//$'\n'/ }"; }
    echo "${image##*/vmlinuz-}" > "$work/release"
    depmod -b "$work" "$(cat "$work/release")"
    extract_vmlinux "$image" > "$work/image" || cp "$image" "$work/image"
    rm -rf "${work:?}/boot" "$kernel"
    mv "$work" "$kernel"
}

# extract_vmlinux BZIMAGE: print the ELF kernel inside. QEMU starts it through its PVH entry, which saves the guest
# from unpacking itself: a second under emulation. Fails where it has no such entry (the Xen note 0x12).
extract_vmlinux() {
    local setup offset length
    setup=$(od -An -tu1 -j 497 -N 1 "$1")
    read -r offset length < <(od -An -tu4 -j 584 -N 8 "$1") # payload_offset and payload_length of the boot protocol
    tail -c +$(((setup + 1) * 512 + offset + 1)) "$1" | head -c "$length" > "$1.payload"
    # Behind the compressed data stand four bytes of its unpacked size, which the unpackers complain about.
    unpack "$1.payload" > "$1.elf" 2>/dev/null || :
    readelf -n "$1.elf" 2>/dev/null | grep 0x00000012 > /dev/null && cat "$1.elf"
}

# unpack FILE: print it, decompressed by its magic number.
unpack() {
    case $(od -An -tx1 -N 4 "$1" | tr -d ' ') in
        28b52ffd) zstd -dc "$1" ;;
        fd377a58) xz -dc "$1" ;;
        1f8b08*) gzip -dc < "$1" ;;
        *) cat "$1" ;;
    esac
}

make_initrd() {
    local work release file name
    release=$(cat "$kernel/release")
    say "packing the micro-VM's modules, once"
    work=$(mktemp -d "$cache/initrd.XXXXXX")
    mkdir -p "$work"/{bin,modules,proc,sys,dev,lower,upper,root}
    cp "$(command -v busybox)" "$work/bin/busybox"
    for name in "${kernel_modules[@]}"; do
        modprobe -d "$kernel" -S "$release" -D "$name" 2>/dev/null || :
    done | awk '$1 == "insmod" && !seen[$2]++ { print $2 }' | while read -r file; do
        name=$(basename "${file%%.ko*}").ko
        unpack "$file" > "$work/modules/$name"
        strip --strip-debug "$work/modules/$name" # this drops the signature too, and with it the time to check it
        echo "$name" >> "$work/modules/order"
    done
    grep -q '^rdma_rxe.ko$' "$work/modules/order" || die "the kernel $release has no rdma_rxe"
    (cd "$work" && find . | cpio -o -H newc --quiet) > "$kernel/initrd.new"
    mv "$kernel/initrd.new" "$kernel/initrd"
    rm -rf "$work"
}
