/* What a program in a container can try: one line each, "WAY<tab>WHAT<tab>OUTCOME".

   OUTCOME is "reached" or the name of the error. Nothing that is tried would harm the
   machine if it succeeded. Static, and without libraries, so that it runs in any image.

     tries ids                 real and effective user and group
     tries as UID PROGRAM...   become that user and execute the program
     tries all FILE            everything; FILE has lines "path P", "socket P", "abstract N",
                               "pid N": what of the machine to reach out for
     tries plainly FILE        only to open its paths and to connect to its sockets
*/

#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/netlink.h>
#include <linux/rtnetlink.h>
#include <linux/vm_sockets.h>
#include <sched.h>
#include <signal.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/ptrace.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <sys/uio.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

#define MAX_TARGETS 64
#define UP "../../../../../../../../../../../.."
#define PLACE "/tmp/place"

struct target {
    char kind[16];
    char what[256];
};

static struct target targets[MAX_TARGETS];
static int target_count;

static void say(const char *way, const char *what, long result)
{
    const char *name = result >= 0 ? "reached" : strerrorname_np(errno);
    printf("%s\t%s\t%s\n", way, what, name ? name : "unknown");
    fflush(stdout);
}

/* Closes what was opened, since one success must not help the next try. */
static void say_fd(const char *way, const char *what, int fd)
{
    say(way, what, fd);
    if (fd >= 0)
        close(fd);
}

static int is_kind(const struct target *target, const char *kind)
{
    return strcmp(target->kind, kind) == 0;
}

static void read_targets(const char *file)
{
    FILE *lines = fopen(file, "r");
    if (!lines) {
        perror(file);
        exit(2);
    }
    while (target_count < MAX_TARGETS &&
           fscanf(lines, "%15s %255s", targets[target_count].kind, targets[target_count].what) == 2)
        target_count++;
    fclose(lines);
}

/* --- files: the registers' own paths, by every way that might lead out ------------------- */

static void open_from(const char *way, int directory)
{
    for (int i = 0; i < target_count; i++) {
        char path[512];
        if (!is_kind(&targets[i], "path"))
            continue;
        snprintf(path, sizeof path, UP "%s", targets[i].what);
        say_fd(way, targets[i].what, openat(directory, path, O_RDONLY));
    }
}

static void open_below(const char *prefix)
{
    for (int i = 0; i < target_count; i++) {
        char path[512];
        if (!is_kind(&targets[i], "path"))
            continue;
        snprintf(path, sizeof path, "%s%s", prefix, targets[i].what);
        say_fd(prefix, targets[i].what, open(path, O_RDONLY));
        snprintf(path, sizeof path, "%s/" UP "%s", prefix, targets[i].what);
        say_fd(prefix, targets[i].what, open(path, O_RDONLY));
    }
}

static void through_descriptors(const char *process)
{
    char folder[64];
    snprintf(folder, sizeof folder, "/proc/%.16s/fd", process);
    DIR *numbers = opendir(folder);
    if (!numbers)
        return;
    for (struct dirent *one; (one = readdir(numbers));) {
        char path[512];
        if (one->d_name[0] == '.')
            continue;
        snprintf(path, sizeof path, "%s/%.16s", folder, one->d_name);
        int fd = open(path, O_PATH | O_DIRECTORY);
        if (fd < 0)
            continue;
        open_from(path, fd);
        close(fd);
    }
    closedir(numbers);
}

static void through_processes(void)
{
    DIR *processes = opendir("/proc");
    for (struct dirent *one; processes && (one = readdir(processes));) {
        static const char *links[] = {"root", "cwd", "task/1/root", "map_files"};
        if (one->d_name[0] < '0' || one->d_name[0] > '9')
            continue;
        for (size_t i = 0; i < sizeof links / sizeof *links; i++) {
            char prefix[64];
            snprintf(prefix, sizeof prefix, "/proc/%.16s/%s", one->d_name, links[i]);
            open_below(prefix);
        }
        through_descriptors(one->d_name);
    }
    if (processes)
        closedir(processes);
}

/* The classic way out of chroot(2): a directory that is above the new root. */
static void out_of_a_chroot(void)
{
    fflush(stdout);
    if (fork() == 0) {
        int top = open("/", O_PATH | O_DIRECTORY);
        mkdir("/tmp/jail", 0700);
        if (chroot("/tmp/jail") == 0 && fchdir(top) == 0) {
            for (int i = 0; i < 64; i++)
                if (chdir("..") < 0)
                    break;
            if (chroot(".") == 0)
                open_below("");
        }
        _exit(0);
    }
    wait(NULL);
}

static void by_handle(void)
{
    struct {
        struct file_handle head;
        unsigned char bytes[MAX_HANDLE_SZ];
    } handle = {.head = {.handle_bytes = MAX_HANDLE_SZ}};
    int mount_id;
    int top = open("/", O_RDONLY | O_DIRECTORY);
    if (name_to_handle_at(AT_FDCWD, "/", &handle.head, &mount_id, 0) < 0) {
        /* The root of most file systems, as the known way out of containers guesses it. */
        handle.head.handle_bytes = 8;
        handle.head.handle_type = 1;
        memset(handle.bytes, 0, sizeof handle.bytes);
        handle.bytes[0] = 2;
    }
    say_fd("call", "open_by_handle_at", open_by_handle_at(top, &handle.head, O_RDONLY));
    close(top);
}

static void read_bytes(const char *path)
{
    char byte;
    int fd = open(path, O_RDONLY);
    long count = fd < 0 ? -1 : read(fd, &byte, 1);
    if (count == 0) {
        errno = ENODATA;
        count = -1;
    }
    say("read", path, count);
    if (fd >= 0)
        close(fd);
}

static void the_kernel_s_own_files(void)
{
    static const char *readable[] = {
        "/proc/kcore", "/proc/kpagecount", "/proc/vmcore", "/dev/mem",
        "/dev/kmem",   "/dev/port",        "/dev/kmsg",    "/dev/core",
    };
    static const char *writable[] = {
        "/proc/sysrq-trigger",
        "/proc/sys/kernel/core_pattern",
        "/proc/sys/kernel/modprobe",
        "/proc/sys/kernel/hotplug",
        "/proc/sys/kernel/hostname",
        "/proc/sys/vm/drop_caches",
        "/proc/sys/fs/binfmt_misc/register",
        "/proc/sys/net/ipv4/ip_forward",
        "/proc/irq/default_smp_affinity",
        "/proc/bus/pci/00/00.0",
        "/proc/mtrr",
        "/proc/1/exe",
        "/dev/tdx_guest",
        "/dev/tdx-guest",
        "/dev/tpm0",
        "/dev/tpmrm0",
        "/dev/vsock",
        "/dev/vhost-vsock",
        "/dev/kvm",
        "/dev/fuse",
        "/dev/net/tun",
        "/dev/loop-control",
        "/dev/mapper/control",
    };
    for (size_t i = 0; i < sizeof readable / sizeof *readable; i++)
        read_bytes(readable[i]);
    for (size_t i = 0; i < sizeof writable / sizeof *writable; i++)
        say_fd("write", writable[i], open(writable[i], O_WRONLY));
}

/* --- mounts and devices -------------------------------------------------------------------- */

static void mounts(void)
{
    static const char *types[] = {
        "sysfs", "configfs", "devtmpfs", "securityfs", "debugfs", "tracefs",  "proc",
        "tmpfs", "overlay",  "cgroup",   "cgroup2",    "bpf",     "efivarfs", "tsm-mr",
    };
    char what[64];
    mkdir(PLACE, 0700);
    for (size_t i = 0; i < sizeof types / sizeof *types; i++) {
        say("mount", types[i], mount(types[i], PLACE, types[i], 0, NULL));
        snprintf(what, sizeof what, "fsopen %s", types[i]);
        say_fd("call", what, syscall(SYS_fsopen, types[i], 0));
    }
    say("mount", "bind /", mount("/", PLACE, NULL, MS_BIND | MS_REC, NULL));
    say("mount", "bind /proc/1/root", mount("/proc/1/root", PLACE, NULL, MS_BIND, NULL));
    say("mount", "remount / rw", mount(NULL, "/", NULL, MS_REMOUNT | MS_BIND, NULL));
    say("mount", "remount /proc/sys rw",
        mount(NULL, "/proc/sys", NULL, MS_REMOUNT | MS_BIND, NULL));
    say("mount", "share /", mount(NULL, "/", NULL, MS_SHARED | MS_REC, NULL));
    say("call", "umount2 /proc/sys", umount2("/proc/sys", MNT_DETACH));
    say("call", "umount2 /proc/kcore", umount2("/proc/kcore", MNT_DETACH));
    say("call", "pivot_root", syscall(SYS_pivot_root, "/tmp", "/tmp"));
    say_fd("call", "open_tree", syscall(SYS_open_tree, AT_FDCWD, "/", 1));
    say_fd("call", "fspick", syscall(SYS_fspick, AT_FDCWD, "/proc", 0));
    say("call", "move_mount", syscall(SYS_move_mount, AT_FDCWD, "/proc/sys", AT_FDCWD, PLACE, 0));
    say("call", "mount_setattr", syscall(SYS_mount_setattr, AT_FDCWD, "/proc", 0, NULL, 0));
}

static void devices(void)
{
    /* Memory, and minor numbers that guest devices and TPMs are given. */
    static const int numbers[][2] = {
        {1, 1}, {1, 11}, {8, 0}, {10, 121}, {10, 125}, {10, 224}, {10, 229}, {10, 241},
    };
    for (size_t i = 0; i < sizeof numbers / sizeof *numbers; i++) {
        char what[64];
        dev_t number = makedev(numbers[i][0], numbers[i][1]);
        snprintf(what, sizeof what, "%d:%d", numbers[i][0], numbers[i][1]);
        say("mknod", what, mknod("/tmp/device", S_IFCHR | 0600, number));
        snprintf(what, sizeof what, "block %d:%d", numbers[i][0], numbers[i][1]);
        say("mknod", what, mknod("/tmp/device", S_IFBLK | 0600, number));
    }
}

/* --- namespaces and other processes ---------------------------------------------------------- */

static void in_a_child(const char *what, long pid)
{
    if (pid == 0)
        _exit(0);
    say("call", what, pid);
    if (pid > 0)
        waitpid(pid, NULL, 0);
}

static void namespaces(void)
{
    static const struct {
        const char *name;
        int flag;
    } kinds[] = {
        {"user", CLONE_NEWUSER}, {"mnt", CLONE_NEWNS},  {"pid", CLONE_NEWPID},
        {"net", CLONE_NEWNET},   {"ipc", CLONE_NEWIPC}, {"uts", CLONE_NEWUTS},
        {"cgroup", CLONE_NEWCGROUP},
    };
    char what[64];
    for (size_t i = 0; i < sizeof kinds / sizeof *kinds; i++) {
        snprintf(what, sizeof what, "unshare %s", kinds[i].name);
        fflush(stdout);
        /* In a child of its own: what it may gain it must not keep. */
        pid_t child = fork();
        if (child == 0) {
            say("call", what, unshare(kinds[i].flag));
            _exit(0);
        }
        waitpid(child, NULL, 0);
        snprintf(what, sizeof what, "clone %s", kinds[i].name);
        in_a_child(what, syscall(SYS_clone, kinds[i].flag | SIGCHLD, 0, 0, 0, 0));
        unsigned long long arguments[11] = {kinds[i].flag, 0, 0, 0, SIGCHLD};
        snprintf(what, sizeof what, "clone3 %s", kinds[i].name);
        in_a_child(what, syscall(SYS_clone3, arguments, sizeof arguments));
        char path[64];
        snprintf(path, sizeof path, "/proc/1/ns/%s", kinds[i].name);
        snprintf(what, sizeof what, "setns %s", kinds[i].name);
        int fd = open(path, O_RDONLY);
        say("call", what, syscall(SYS_setns, fd, 0));
        if (fd >= 0)
            close(fd);
    }
}

static void processes(void)
{
    say("call", "ptrace", ptrace(PTRACE_ATTACH, getppid(), 0, 0));
    for (int i = 0; i < target_count; i++) {
        if (!is_kind(&targets[i], "pid"))
            continue;
        char byte;
        pid_t pid = atoi(targets[i].what);
        struct iovec here = {&byte, 1}, there = {(void *)0x400000, 1};
        say("process", "kill", kill(pid, 0));
        say("process", "ptrace", ptrace(PTRACE_ATTACH, pid, 0, 0));
        say("process", "process_vm_readv", process_vm_readv(pid, &here, 1, &there, 1, 0));
        say_fd("process", "pidfd_open", syscall(SYS_pidfd_open, pid, 0));
    }
}

/* --- calls that only the machine's root has a use for -------------------------------------- */

static void calls(void)
{
    long parameters[32] = {0};
    char name[] = "name";
    say_fd("call", "io_uring_setup", syscall(SYS_io_uring_setup, 1, parameters));
    say("call", "bpf", syscall(SYS_bpf, 0, parameters, sizeof parameters));
    say_fd("call", "perf_event_open", syscall(SYS_perf_event_open, parameters, 0, -1, -1, 0));
    say_fd("call", "userfaultfd", syscall(SYS_userfaultfd, 1));
    say_fd("call", "fanotify_init", syscall(SYS_fanotify_init, 0, 0));
    say("call", "init_module", syscall(SYS_init_module, parameters, 0, ""));
    say("call", "finit_module", syscall(SYS_finit_module, 0, "", 0));
    say("call", "delete_module", syscall(SYS_delete_module, "no_such_module", O_NONBLOCK));
    say("call", "kexec_load", syscall(SYS_kexec_load, 0, 0, NULL, 0xffff0000));
    say("call", "reboot", syscall(SYS_reboot, 0, 0, 0, NULL));
    say("call", "swapon", syscall(SYS_swapon, "/tmp/none", 0));
    say("call", "acct", syscall(SYS_acct, "/tmp/none"));
    say("call", "quotactl", syscall(SYS_quotactl, 0x800002 << 8, "/", 0, parameters));
    say("call", "settimeofday", syscall(SYS_settimeofday, NULL, NULL));
    say("call", "syslog", syscall(SYS_syslog, 3, parameters, 1));
    say("call", "sethostname", syscall(SYS_sethostname, name, sizeof name - 1));
    say("call", "keyctl", syscall(SYS_keyctl, 0, -3, 1));
    say("call", "add_key", syscall(SYS_add_key, "user", name, "x", 1, -3));
    say("call", "request_key", syscall(SYS_request_key, "user", name, NULL, 0));
#if defined(__x86_64__)
    say("call", "iopl", syscall(SYS_iopl, 3));
    say("call", "ioperm", syscall(SYS_ioperm, 0x80, 1, 1));
#endif
}

#if defined(__x86_64__)
static void other_tables(void)
{
    /* x86 has two more tables of system calls: one of 32 bits, and x32. */
    for (int x32 = 0; x32 < 2; x32++) {
        int status = 0;
        fflush(stdout);
        pid_t child = fork();
        if (child == 0) {
            long result;
            if (x32)
                result = syscall(0x40000000 | SYS_mount, "t", PLACE, "tmpfs", 0, NULL);
            else
                __asm__ volatile("int $0x80" : "=a"(result) : "a"(20) /* getpid */ : "memory");
            _exit(result > 0 || (x32 && result == 0) ? 0 : 1);
        }
        waitpid(child, &status, 0);
        printf("call\t%s\t%s\n", x32 ? "x32" : "int 0x80",
               WIFEXITED(status) && WEXITSTATUS(status) == 0 ? "reached"
               : WIFSIGNALED(status)                         ? "killed"
                                                             : "refused");
    }
}
#endif

/* --- sockets ------------------------------------------------------------------------------- */

static void connect_unix(const char *way, const char *what, const char *path, int abstract)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    size_t length = strlen(path);
    if (length + 1 >= sizeof address.sun_path) {
        errno = ENAMETOOLONG;
        say(way, what, -1);
        return;
    }
    memcpy(address.sun_path + abstract, path, length);
    int fd = socket(AF_UNIX, SOCK_STREAM, 0);
    say(way, what,
        connect(fd, (struct sockaddr *)&address,
                offsetof(struct sockaddr_un, sun_path) + length + 1));
    close(fd);
}

static void unix_sockets(void)
{
    for (int i = 0; i < target_count; i++) {
        if (is_kind(&targets[i], "abstract"))
            connect_unix("abstract", targets[i].what, targets[i].what, 1);
        if (!is_kind(&targets[i], "socket"))
            continue;
        static const char *prefixes[] = {"", "/proc/1/root", "/proc/self/cwd/../.."};
        for (size_t j = 0; j < sizeof prefixes / sizeof *prefixes; j++) {
            char path[512];
            snprintf(path, sizeof path, "%s%s", prefixes[j], targets[i].what);
            connect_unix("socket", targets[i].what, path, 0);
        }
    }
}

static void families(void)
{
    static const struct {
        const char *name;
        int family, type, protocol;
    } kinds[] = {
        {"packet", AF_PACKET, SOCK_RAW, 0x300},
        {"raw", AF_INET, SOCK_RAW, 1},
        {"alg", AF_ALG, SOCK_SEQPACKET, 0},
        {"bluetooth", AF_BLUETOOTH, SOCK_RAW, 1},
        {"key", AF_KEY, SOCK_RAW, 2},
        {"tipc", AF_TIPC, SOCK_SEQPACKET, 0},
        {"qipcrtr", 42, SOCK_DGRAM, 0},
        {"xdp", 44, SOCK_RAW, 0},
    };
    for (size_t i = 0; i < sizeof kinds / sizeof *kinds; i++)
        say_fd("family", kinds[i].name, socket(kinds[i].family, kinds[i].type, kinds[i].protocol));
    static const unsigned machines[] = {VMADDR_CID_HYPERVISOR, VMADDR_CID_LOCAL, VMADDR_CID_HOST};
    for (size_t i = 0; i < sizeof machines / sizeof *machines; i++) {
        /* 4050: where a TD's quoting service listens. */
        struct sockaddr_vm address = {
            .svm_family = AF_VSOCK, .svm_cid = machines[i], .svm_port = 4050};
        int fd = socket(AF_VSOCK, SOCK_STREAM, 0);
        char what[32];
        snprintf(what, sizeof what, "vsock %u", machines[i]);
        say("family", what, fd < 0 ? -1 : connect(fd, (struct sockaddr *)&address, sizeof address));
        if (fd >= 0)
            close(fd);
    }
}

/* The network is the machine's own; changing it must be refused. Interface 0 does not exist. */
static void change_the_network(void)
{
    struct {
        struct nlmsghdr head;
        struct ifinfomsg link;
    } request = {.head = {sizeof request, RTM_DELLINK, NLM_F_REQUEST | NLM_F_ACK, 1, 0}};
    struct {
        struct nlmsghdr head;
        struct nlmsgerr error;
        char rest[256];
    } answer;
    int fd = socket(AF_NETLINK, SOCK_RAW, NETLINK_ROUTE);
    long result = fd < 0 ? -1 : send(fd, &request, sizeof request, 0);
    if (result >= 0 && recv(fd, &answer, sizeof answer, 0) > 0 &&
        answer.head.nlmsg_type == NLMSG_ERROR) {
        errno = -answer.error.error;
        result = answer.error.error ? -1 : 0;
    }
    say("network", "RTM_DELLINK", result);
    if (fd >= 0)
        close(fd);
}

/* Its own and the neighbours' way to the supervisor: nobody may take their place. */
static void replace_sockets(void)
{
    static const char *paths[] = {"/run/acon.sock", "/shared/acon.sock"};
    for (size_t i = 0; i < sizeof paths / sizeof *paths; i++) {
        char beside[64];
        snprintf(beside, sizeof beside, "%s.stolen", paths[i]);
        say("rename", paths[i], rename(paths[i], beside));
        say("unlink", paths[i], unlink(paths[i]));
    }
}

static int end(void)
{
    printf("done\tall\tdone\n");
    return 0;
}

static int plainly(const char *file)
{
    read_targets(file);
    open_below("");
    unix_sockets();
    return end();
}

static int all(const char *file)
{
    read_targets(file);
    open_below("");
    through_processes();
    out_of_a_chroot();
    by_handle();
    the_kernel_s_own_files();
    mounts();
    open_below(PLACE);
    devices();
    namespaces();
    processes();
    calls();
#if defined(__x86_64__)
    other_tables();
#endif
    unix_sockets();
    families();
    change_the_network();
    replace_sockets();
    return end();
}

int main(int argc, char **argv)
{
    if (argc == 2 && strcmp(argv[1], "ids") == 0)
        return printf("%d %d %d %d\n", getuid(), geteuid(), getgid(), getegid()) < 0;
    if (argc >= 4 && strcmp(argv[1], "as") == 0) {
        uid_t uid = atoi(argv[2]);
        if (setresuid(uid, uid, uid) < 0) {
            say("as", argv[2], -1);
            return 1;
        }
        execv(argv[3], argv + 3);
        return 127;
    }
    if (argc == 3 && strcmp(argv[1], "all") == 0)
        return all(argv[2]);
    if (argc == 3 && strcmp(argv[1], "plainly") == 0)
        return plainly(argv[2]);
    fprintf(stderr, "tries ids | as UID PROGRAM... | all FILE | plainly FILE\n");
    return 2;
}
