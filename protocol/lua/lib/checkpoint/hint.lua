-- Tell the producer that there is something to read. It may get lost: what counts is what stands in the keys.
local function hint(client, id, what)
  if client and client ~= '' then redis.call('PUBLISH', KEY.replies .. client, id .. ' ' .. what) end
end
