# What a container's first process sees: one file for each fact, in /tmp/facts.
b=/bin/busybox
f=/tmp/facts.new
$b mkdir "$f"

umask > "$f/umask"
: > "$f/made"
$b stat -c %a "$f/made" > "$f/made_mode"
for name in status environ cmdline uid_map gid_map mountinfo cgroup limits oom_score_adj; do
    $b cat "/proc/1/$name" > "$f/$name"
done
for name in user pid mnt ipc uts cgroup net; do
    echo "$name $($b readlink /proc/1/ns/$name)"
done > "$f/namespaces"
$b readlink /proc/1/cwd > "$f/working_dir"
$b hostname > "$f/hostname"
(cd /proc && $b ls -d [0-9]*) > "$f/processes"
$b cat /proc/1/stat > "$f/stat"
# In the background, since the shell would have the output's file among its own descriptors.
$b sh -c 'for fd in /proc/1/fd/*; do
    echo "${fd##*/} $(/bin/busybox readlink $fd)"
done' > "$f/descriptors" &
wait $!

$b ls -A /dev > "$f/dev"
$b find /dev ! -type d ! -type l -exec $b stat -c '%F %t:%T %n' {} + > "$f/dev_nodes"
for device in null zero full random urandom; do
    $b dd if=/dev/$device of=/dev/null bs=1 count=1 2> /dev/null && echo $device
done > "$f/dev_readable"
$b find /sys > "$f/sys"
$b stat -c '%a %u %g %n' /tmp /run /run/user /run/user/* /shared /dev/shm > "$f/folders" 2>&1
for folder in /tmp /run /run/user/0 /shared /dev/shm; do
    : > "$folder/written.$$.$($b hostname)" && echo "$folder"
done > "$f/writable" 2> /dev/null

for path in /proc/*; do
    case ${path#/proc/} in
    acpi | asound | interrupts | kcore | keys | latency_stats | sched_debug | scsi | timer_list | \
        timer_stats)
        if $b test -d "$path"; then
            echo "$path $($b ls -A "$path" | $b wc -c)"
        else
            echo "$path $($b head -c 16 "$path" 2> /dev/null | $b wc -c)"
        fi
        ;;
    esac
done > "$f/masked"
for path in /proc/sys/kernel/msgmax /proc/sys/kernel/hostname /proc/sys/kernel/core_pattern /proc/sys/vm/swappiness \
    /proc/sys/net/ipv4/ip_forward /proc/sysrq-trigger /proc/irq/default_smp_affinity /app/new \
    /new; do
    (echo 1 >> "$path") 2>&1 | $b sed "s|^.*: |$path |"
    $b test -e "$path" && echo "$path is there"
done > "$f/write_errors"

# Its neighbours, by way of the one folder that they have in common.
for note in /shared/*.open /shared/*.closed; do
    $b cat "$note" 2>&1
    $b rm -f "$note" 2>&1
done > "$f/neighbours"
echo "open to all" > "/shared/$($b hostname).open"
$b chmod 644 "/shared/$($b hostname).open"
echo "closed" > "/shared/$($b hostname).closed"

if $b test -x /app/tries; then
    /app/tries ids > "$f/ids"
    /app/as33 ids > "$f/ids_as33"
    /app/as77 ids > "$f/ids_as77"
    /app/tries as 33 /app/as0 ids > "$f/ids_back"
fi 2> /dev/null

$b mv "$f" /tmp/facts
trap 'exit 0' TERM
while :; do $b sleep 1 & wait $!; done
