#include "lex.h"

#include <cctype>

namespace ptx {

static bool inWord(char c) { return std::isalnum((unsigned char)c) || c == '_' || c == '$' || c == '%' || c == '.'; }

std::vector<Token> lex(const std::string& src) {
    std::vector<Token> out;
    size_t i = 0, n = src.size();
    int line = 1;
    while (i < n) {
        char c = src[i];
        if (c == '\n') line++;
        if (std::isspace((unsigned char)c)) {
            i++;
        } else if (src.compare(i, 2, "//") == 0) {
            while (i < n && src[i] != '\n') i++;
        } else if (src.compare(i, 2, "/*") == 0) {
            size_t e = src.find("*/", i + 2);
            e = e == std::string::npos ? n : e + 2;
            for (; i < e; i++) line += src[i] == '\n';
        } else if (c == '"') {
            size_t e = src.find('"', i + 1);
            e = e == std::string::npos ? n : e + 1;
            out.push_back({Token::string, src.substr(i, e - i), line, i, e});
            i = e;
        } else if (inWord(c)) {
            size_t b = i;
            while (i < n && (inWord(src[i]) || (src.compare(i, 2, "::") == 0 && (i += 1)))) i++;
            out.push_back({Token::word, src.substr(b, i - b), line, b, i});
        } else {
            out.push_back({Token::punct, std::string(1, c), line, i, i + 1});
            i++;
        }
    }
    out.push_back({Token::end, "", line, n, n});
    return out;
}

}  // namespace ptx
