/* A client of ACON's binary protocol, written from docs/formats.md alone:
 *
 *     acon_client SOCKET report|quote|set KIND [DATA]
 *
 * KIND is 0 (none), 1 (binary) or 2 (text). The answer is written to standard output as it
 * came. It proves that the layouts are those of a C compiler, its padding included.
 */
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

struct head {
    int32_t command;
    uint32_t bytes;
};

struct ask_report {
    struct head head;
    uint32_t want;
    uint64_t nonce[2];
    int32_t kind;
};

struct say {
    struct head head;
    int32_t kind;
};

int main(int argc, char **argv)
{
    char message[512], answer[65536];
    size_t used, length = argc > 4 ? strlen(argv[4]) : 0;
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    ssize_t got;

    if (argc < 4 || length > 256 || strlen(argv[1]) >= sizeof address.sun_path)
        return 2;
    memset(message, 0xAA, sizeof message); /* whatever the padding happens to hold */
    if (strcmp(argv[2], "set") == 0) {
        struct say *say = (struct say *)message;
        used = sizeof *say;
        say->head.command = 2;
        say->kind = atoi(argv[3]);
    } else {
        struct ask_report *ask = (struct ask_report *)message;
        used = sizeof *ask;
        ask->head.command = 0;
        ask->want = strcmp(argv[2], "quote") == 0;
        ask->nonce[0] = 0x1111111111111111u;
        ask->nonce[1] = 0x2222222222222222u;
        ask->kind = atoi(argv[3]);
    }
    if (length)
        memcpy(message + used, argv[4], length);
    used += length;
    ((struct head *)message)->bytes = (uint32_t)used;

    strcpy(address.sun_path, argv[1]);
    int connection = socket(AF_UNIX, SOCK_STREAM, 0);
    if (connect(connection, (struct sockaddr *)&address, sizeof address) != 0)
        return 3;
    if (write(connection, message, used) != (ssize_t)used)
        return 4;
    while ((got = read(connection, answer, sizeof answer)) > 0)
        fwrite(answer, 1, (size_t)got, stdout);
    return got < 0 ? 5 : 0;
}
