# shellcheck shell=bash
# The micro-VM: boots the kernel of kernel.sh under QEMU and runs one command in it. Sourced by softroce.
#
# run_in_vm ACCELERATOR CMD...: run CMD in a guest; its status, or 125 if the guest died before CMD ended.
# Standard input, output, error and the status each have a virtio serial port. Nothing remains if we are killed:
# QEMU dies with us, and the temporary directory goes in the trap.

vm_dir='' vm_pids=()

vm_cleanup() {
    if [ ${#vm_pids[@]} != 0 ]; then
        kill "${vm_pids[@]}" 2>/dev/null || :
        for _ in {1..20}; do
            kill -0 "${vm_pids[@]}" 2>/dev/null || break
            sleep 0.1
        done
        kill -KILL "${vm_pids[@]}" 2>/dev/null || :
        vm_pids=()
    fi
    [ -z "$vm_dir" ] || rm -rf "$vm_dir"
    vm_dir=''
}

run_in_vm() {
    local accelerator=$1 out='' status=0 qemu reader_out reader_err ended=''
    shift
    [ "$accelerator" != tcg ] || accelerator=tcg,thread=multi
    vm_dir=$(mktemp -d -t memkv.XXXXXX)
    [ -z "${MEMKV_SOFTROCE_OUT:-}" ] || { mkdir -p "$MEMKV_SOFTROCE_OUT"; out=$(cd "$MEMKV_SOFTROCE_OUT" && pwd -P); }
    mkdir "$vm_dir/job"
    vm_settings "$out" > "$vm_dir/job/settings"
    vm_command "$out" "$@" > "$vm_dir/job/command"
    cp "$repo/script/lib/guest-init" "$vm_dir/init"
    chmod 755 "$vm_dir/init"
    # The kernel reads several archives one after another; the second holds what belongs to this run.
    (cd "$vm_dir" && printf '%s\n' init job job/settings job/command | cpio -o -H newc --quiet) |
        cat "$kernel/initrd" - > "$vm_dir/initrd"

    mkfifo "$vm_dir"/{in,out,err}
    : > "$vm_dir/status"
    { exec 3<&0; } 2>/dev/null || exec 3< /dev/null
    cat "$vm_dir/out" & reader_out=$!
    cat "$vm_dir/err" >&2 & reader_err=$!
    (exec cat <&3 > "$vm_dir/in") 2>/dev/null & vm_pids+=("$!")
    vm_pids+=("$reader_out" "$reader_err")
    local qemu_args=(
        -M pc -accel "$accelerator" -cpu max -smp "${MEMKV_SOFTROCE_CPUS:-2}" -m "${MEMKV_SOFTROCE_MEM:-3G}"
        -nodefaults -no-user-config -no-reboot -display none -monitor none -serial "file:$vm_dir/console"
        -kernel "$kernel/image" -initrd "$vm_dir/initrd"
        -append "console=ttyS0 quiet panic=-1 nokaslr mitigations=off tsc=reliable no_timer_check rodata=off audit=0 lsm= cryptomgr.notests random.trust_cpu=on"
        -fsdev "local,id=root,path=/,security_model=none,readonly=on,multidevs=remap"
        -device "virtio-9p-pci,fsdev=root,mount_tag=root"
        -device virtio-serial-pci
        -chardev "stdio,id=in,signal=off" -device "virtserialport,chardev=in,nr=1"
        -chardev "file,id=out,path=$vm_dir/out" -device "virtserialport,chardev=out,nr=2"
        -chardev "file,id=err,path=$vm_dir/err" -device "virtserialport,chardev=err,nr=3"
        -chardev "file,id=status,path=$vm_dir/status" -device "virtserialport,chardev=status,nr=4"
    )
    [ -z "$out" ] || qemu_args+=(
        -fsdev "local,id=out,path=$out,security_model=none" -device "virtio-9p-pci,fsdev=out,mount_tag=out"
    )
    [ -z "${MEMKV_SOFTROCE_NVME:-}" ] || qemu_args+=(
        -drive "file=$MEMKV_SOFTROCE_NVME,if=none,id=nvme,format=raw,cache=none,discard=unmap"
        -device "nvme,drive=nvme,serial=memkv"
    )
    # setpriv: QEMU must not outlive us, even if we are killed outright.
    setpriv --pdeathsig KILL timeout -k 5 "${MEMKV_SOFTROCE_TIMEOUT:-0}" setpriv --pdeathsig KILL \
        qemu-system-x86_64 "${qemu_args[@]}" < "$vm_dir/in" > "$vm_dir/qemu" 2>&1 & qemu=$!
    vm_pids+=("$qemu")

    wait -n -p ended "$qemu" "$reader_out" || status=$?
    if [ "$ended" = "$reader_out" ]; then
        if [ "$status" != 0 ]; then vm_cleanup; return 141; fi # nobody reads our output any more: as SIGPIPE would
        wait "$qemu" || status=$?
    fi
    : <> "$vm_dir/out" <> "$vm_dir/err" # a reader may wait still for QEMU to open its end
    wait "$reader_out" "$reader_err" 2>/dev/null || :
    if [ -s "$vm_dir/status" ]; then
        status=$(cat "$vm_dir/status")
    elif [ "$status" = 124 ] && [ -n "${MEMKV_SOFTROCE_TIMEOUT:-}" ]; then
        say "stopped after MEMKV_SOFTROCE_TIMEOUT=$MEMKV_SOFTROCE_TIMEOUT seconds"
    else
        tail -n 30 "$vm_dir/qemu" "$vm_dir/console" >&2 || :
        say "the guest died before the command ended"
        status=125
    fi
    exec 3<&-
    vm_cleanup
    return "$status"
}

# vm_settings OUT: what guest-init needs to know, as shell assignments.
vm_settings() {
    local release
    release=$(cat "$kernel/release")
    printf '%s=%q\n' release "$release" modules "$(cd "$kernel/lib/modules/$release" && pwd -P)" hostname "$(uname -n)" \
        devices "${MEMKV_SOFTROCE_DEVICES:-1}" hugepages "${MEMKV_SOFTROCE_HUGEPAGES:-}" \
        nvme "${MEMKV_SOFTROCE_NVME:-}" out "$1"
}

# vm_command OUT CMD...: a bash script that restores environment and directory, then becomes CMD.
vm_command() {
    local name
    for name in $(compgen -e); do
        case $name in
            BASHOPTS | SHELLOPTS | SHLVL | PWD | OLDPWD | _) ;;
            *) printf 'export %s=%q\n' "$name" "${!name}" ;;
        esac
    done
    [ -z "$1" ] || printf 'export MEMKV_SOFTROCE_OUT=%q\n' "$1"
    # The guest's /run and /dev/shm are its own.
    # shellcheck disable=SC2016
    echo 'for d in "${TMPDIR:-}" "${XDG_RUNTIME_DIR:-}"; do [ -z "$d" ] || mkdir -p "$d"; done'
    printf 'cd %q || exit\n' "$PWD"
    shift
    printf 'exec'
    printf ' %q' "$@"
    echo
}
